"""Overviews and animations: rows of frames, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn

from adamae_sampler.losses import AdaMAELoss
from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.visualize.steps import Statistics, Step, check_grid, filled_in, shown_frames, step_of, stretched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "true": "prediction\n(each patch's true\nmean and contrast)",
    "visible": "prediction\n(mean and contrast of\nvisible patches)",
}


@dataclass(frozen=True)
class _Row:
    """One row of a picture: images [T, H, W, C], or maps [T, H, W] in a colour map."""

    title: str
    images: Tensor
    colours: str | None = None


@overload
def overview(
    model: nn.Module,
    /,
    inputs: Tensor,
    criterion: AdaMAELoss | None = None,
    *,
    generator: torch.Generator | None = None,
    statistics: Statistics = "true",
    clip: int = 0,
    channels: Sequence[int] | None = None,
) -> Figure: ...


@overload
def overview(
    video: Tensor,
    /,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    *,
    normalize: bool,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    statistics: Statistics = "true",
    clip: int = 0,
    channels: Sequence[int] | None = None,
) -> Figure: ...


def overview(
    *what: Any, statistics: Statistics = "true", clip: int = 0, channels: Sequence[int] | None = None, **how: Any
) -> Figure:
    """One clip as rows of frames: video, prediction, error, p, mask (the paper's Figures 2 to 10).

    `overview(model, inputs)` takes a patched model that computes its loss, and has no row of predictions, since hosts
    lay them out differently. `overview(model, inputs, criterion)` takes a model that returns (prediction, sample): one
    of your own, `AdaMAE`, a patched VideoMAE. Both run the model once, in evaluation mode, without gradients. They
    leave its mode and parameters as they were. `overview(video, prediction, sample, token_error, normalize=...)` draws
    tensors.

    A column is a time step, shown by the first frame of its tubelet. Images have one column.

    Args:
        model: unwrapped, without DDP.
        inputs: what the model takes. Floating-point pixels are shown in [0, 1], see `criterion`.
        criterion: an `AdaMAELoss`. Its `mean` and `std` undo the normalisation of the inputs. Without them inputs that
            leave [0, 1] are stretched over the range of the clip.
        generator: draws the mask, if the model takes one.
        video: [B, C, T, H, W].
        prediction: [B, M, P].
        sample: the mask. Hard masks have a row of predicted errors in place of p; masks with neither have none.
        token_error: [B, M], the error of each masked token.
        normalize: whether the target was normalised per patch and channel.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        statistics: source of brightness and contrast of a normalised prediction, see `predicted_video`.
        clip: index in the batch.
        channels: three channels to show as RGB, or one, of a video that has others.
        what: the positional ones of these.
        how: the other ones of these.

    Raises:
        TypeError: a model that returns something else, or that needs a criterion.
        ValueError: sizes that do not fit, or channels that a picture cannot show.
    """
    step = step_of(*what, **how)
    return _draw_rows(_rows(step, statistics, clip, channels), step.patches.patch[0])


def animation(
    *what: Any, statistics: Statistics = "true", clip: int = 0, channels: Sequence[int] | None = None, **how: Any
) -> Tensor:
    """The panels of `overview` side by side, frame after frame (supplement, section K): [T, height, width, 3] uint8.

    It takes the arguments of `overview`. `save_animation` writes the result.
    """
    rows = _rows(step_of(*what, **how), statistics, clip, channels)
    limits = {row.title: (float(row.images.min()), float(row.images.max())) for row in rows}
    return torch.stack(
        [
            _draw_panels([_Row(row.title, row.images[t : t + 1], row.colours) for row in rows], limits)
            for t in range(rows[0].images.shape[0])
        ]
    )


def mask_overview(
    video: Tensor,
    samples: Mapping[str, MaskSample],
    *,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    clip: int = 0,
    channels: Sequence[int] | None = None,
) -> Figure:
    """One clip as rows of frames: video, p, and a mask for each sample (the paper's Figures 11 to 14).

    Args:
        video: [B, C, T, H, W].
        samples: the masks by title, such as "95%". The row of p, or of predicted errors, is from the first mask.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        clip: index of the clip in the batch.
        channels: see `overview`.
    """
    patches = PatchFormat.of(patch_size, tubelet_size)
    frames, grid = shown_frames(video, clip, patches, channels), patches.grid(video.shape)
    first = next(iter(samples.values()))
    rows = [_Row("video", frames), *_score_row(first, clip, grid, tubelet_size)]
    rows += [_Row(title, _seen(frames, sample, clip, grid, patches)) for title, sample in samples.items()]
    return _draw_rows(rows, tubelet_size)


def _rows(step: Step, statistics: Statistics, clip: int, channels: Sequence[int] | None) -> list[_Row]:
    """The rows of a clip, with an image for each of its frames."""
    video, sample, patches = step.video, step.sample, step.patches
    frames, grid, tubelet_size = shown_frames(video, clip, patches, channels), check_grid(step), patches.patch[0]
    error = torch.zeros(sample.num_tokens).scatter(
        0, sample.masked_idx[clip].cpu(), step.token_error[clip].detach().float().cpu()
    )
    rows = [_Row("video", frames)]
    if step.prediction is not None:
        filled = filled_in(step.prediction, video, sample, patches, statistics)[clip].permute(1, 2, 3, 0).cpu()
        if video.is_floating_point() and patches.mean is None:
            filled = stretched(filled, video[clip])
        filled = filled if channels is None else filled[..., list(channels)]
        rows.append(_Row(_LABELS[statistics] if patches.normalize else "prediction", filled.clamp(0, 1)))
    return [
        *rows,
        _Row(f"error\n0 to {float(error.max()):.2g}", error.view(grid).repeat_interleave(tubelet_size, 0), "magma"),
        *_score_row(sample, clip, grid, tubelet_size),
        _Row(
            f"mask\n{sample.num_tokens - sample.num_visible} of {sample.num_tokens}\ntokens masked",
            _seen(frames, sample, clip, grid, patches),
        ),
    ]


def _score_row(sample: MaskSample, clip: int, grid: tuple[int, int, int], tubelet_size: int) -> list[_Row]:
    """What the mask was drawn by: p, or predicted errors; empty for masks with neither."""
    if sample.log_probs is not None:
        scores = sample.log_probs[clip].detach().exp().view(grid).cpu()
        low, high = (float(each) * scores.numel() for each in scores.aminmax())
        title = f"p\n{low:.2g} to {high:.2g} of\na uniform one"
    elif sample.difficulty is not None:
        scores = sample.difficulty[clip].detach().float().view(grid).cpu()
        title = "predicted\nto be hard"  # the scores order tokens, and have no unit
    else:
        return []
    return [_Row(title, scores.repeat_interleave(tubelet_size, 0), "jet")]


def _seen(frames: Tensor, sample: MaskSample, clip: int, grid: tuple[int, int, int], patches: PatchFormat) -> Tensor:
    """The frames with masked patches darkened."""
    tubelet_size, p1, p2 = patches.patch
    mask = sample.mask[clip].view(grid).cpu()
    pixels = mask.repeat_interleave(tubelet_size, 0).repeat_interleave(p1, 1).repeat_interleave(p2, 2)
    return torch.where(pixels[..., None], (frames.float() * 0.15).to(frames.dtype), frames)


def _draw_rows(rows: list[_Row], tubelet_size: int) -> Figure:
    """A figure with one column for each tubelet. A column shows the tubelet's first frame."""
    shown = range(0, rows[0].images.shape[0], tubelet_size)
    columns = len(shown)
    height, width = rows[0].images.shape[1:3]
    spacing = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.01, wspace=0, hspace=0)  # text is wider at a low dpi
    figure = Figure(figsize=(1.5 * columns + 1.2, 1.5 * len(rows) * height / width), layout=spacing)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        show = _colour_map(row)
        for frame, cell in zip(shown, line, strict=True):
            show(cell, row.images[frame])
            cell.set_xticks([])
            cell.set_yticks([])
        line[0].set_ylabel(row.title, rotation=0, ha="right", va="center", fontsize=9)
    for frame, cell in zip(shown, axes[0], strict=True):
        cell.set_title(f"frame {frame}", fontsize=8)
    return figure


def _draw_panels(panels: list[_Row], limits: Mapping[str, tuple[float, float]]) -> Tensor:
    """One frame of each panel, side by side, as [height, width, 3] uint8."""
    height, width = panels[0].images.shape[1:3]
    figure = Figure(figsize=(2.0 * len(panels), 2.0 * height / width + 0.6), dpi=80, layout="constrained")
    for panel, cell in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _colour_map(panel, limits[panel.title])(cell, panel.images[0])
        cell.set_title(panel.title, fontsize=8)
        cell.set_axis_off()
    return to_pixels(figure)


def to_pixels(figure: Figure) -> Tensor:
    """A figure as [height, width, 3] uint8, for TensorBoard's `add_image(..., dataformats="HWC")` and for trackers."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    columns, lines = canvas.get_width_height()
    return rgba.view(lines, columns, 4)[..., :3].clone()


def _colour_map(row: _Row, limits: tuple[float, float] | None = None) -> Callable[[Axes, Tensor], object]:
    """A function that draws one image of a row. All maps of a row share one colour scale, so frames compare."""
    if row.colours is None:
        top = 1 if row.images.is_floating_point() else 255  # for grey images; matplotlib takes RGB as it is
        return lambda cell, image: cell.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=top)
    low, high = limits or (float(row.images.min()), float(row.images.max()))
    return lambda cell, image: cell.imshow(image.numpy(), cmap=row.colours, vmin=low, vmax=high)
