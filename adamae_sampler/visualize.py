"""Pictures and animations of what a masked autoencoder sees and predicts.

This module needs matplotlib, so the package does not import it: use `import adamae_sampler.visualize`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.patches import join_patches
from adamae_sampler.ops.target import STD_EPS, target_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Statistics = Literal["true", "visible"]

_LABELS = {
    "true": "prediction\n(each patch's true\nmean and contrast)",
    "visible": "prediction\n(mean and contrast of\nvisible patches)",
}


def predicted_video(
    prediction: Tensor,
    video: Tensor,
    sample: MaskSample,
    *,
    normalize: bool,
    statistics: Statistics = "true",
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
) -> Tensor:
    """The clip with its masked patches predicted and its visible ones as they are.

    With a normalised target the decoder predicts neither brightness nor contrast of a patch. "true" takes both from the
    true patch. The picture is then readable, and better than the model: say so where you show it. "visible" takes the
    averages over the visible patches of the clip, so it uses only what the model saw.

    Args:
        prediction: [B, M, P].
        video: [B, C, T, H, W] uint8.
        sample: the mask.
        normalize: whether the target was normalised per patch and channel.
        statistics: source of brightness and contrast of a normalised prediction, "true" or "visible".
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.

    Returns:
        [B, C, T, H, W] in [0, 1].
    """
    return _predicted(prediction, video, sample, PatchFormat.of(patch_size, tubelet_size, normalize), statistics)


def _predicted(
    prediction: Tensor, video: Tensor, sample: MaskSample, patches: PatchFormat, statistics: Statistics
) -> Tensor:
    if statistics not in _LABELS:
        raise ValueError(f"statistics={statistics!r}, expected 'true' or 'visible'.")
    pixels = target_rows(video, None, patches._replace(normalize=False))  # [B, N, P]
    masked_idx = _expand(sample.masked_idx, pixels)
    predicted = prediction.detach().float()
    if patches.normalize:
        channels = video.shape[1]
        known = masked_idx if statistics == "true" else _expand(sample.visible_idx, pixels)
        known_pixels = pixels.gather(1, known).unflatten(-1, (-1, channels))  # [B, M or K, pixels, C]
        variance, mean = torch.var_mean(known_pixels, dim=-2, keepdim=True)
        deviation = variance.sqrt() + STD_EPS
        if statistics == "visible":
            mean, deviation = mean.mean(1, keepdim=True), deviation.mean(1, keepdim=True)
        predicted = (predicted.unflatten(-1, (-1, channels)) * deviation + mean).flatten(-2)
    filled = pixels.scatter(1, masked_idx, predicted)
    return join_patches(filled, patches.grid(video.shape), patches).clamp(0, 1)


def _expand(idx: Tensor, pixels: Tensor) -> Tensor:
    return idx[..., None].expand(-1, -1, pixels.shape[2])


@dataclass(frozen=True)
class _Row:
    """One row of a picture: images [T, H, W, C], or maps [T, H, W] in a colour map."""

    title: str
    images: Tensor
    colours: str | None = None


def overview(
    video: Tensor,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    *,
    normalize: bool,
    statistics: Statistics = "true",
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    clip: int = 0,
) -> Figure:
    """One clip as rows of frames: video, prediction, error, p, mask (the paper's Figures 2 to 10).

    A column is a time step, shown by the first frame of its tubelet.

    Args:
        video: [B, C, T, H, W] uint8 with one or three channels.
        prediction: [B, M, P].
        sample: the mask. Hard masks have a row of predicted errors in place of p; masks with neither have none.
        token_error: [B, M], the error of each masked token.
        normalize: whether the target was normalised per patch and channel.
        statistics: see `predicted_video`.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        clip: index of the clip in the batch.
    """
    patches = PatchFormat.of(patch_size, tubelet_size, normalize)
    rows = _rows(video, prediction, sample, token_error, patches, statistics, clip)
    return _draw_rows(rows, tubelet_size)


def mask_overview(
    video: Tensor,
    samples: Mapping[str, MaskSample],
    *,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    clip: int = 0,
) -> Figure:
    """One clip as rows of frames: video, p, and a mask for each sample (the paper's Figures 11 to 14).

    Args:
        video: [B, C, T, H, W] uint8 with one or three channels.
        samples: the masks by title, such as "95%". The row of p, or of predicted errors, is from the first mask.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        clip: index of the clip in the batch.
    """
    patches = PatchFormat.of(patch_size, tubelet_size)
    frames, grid = _frames(video, clip), patches.grid(video.shape)
    first = next(iter(samples.values()))
    rows = [_Row("video", frames), *_score_row(first, clip, grid, tubelet_size)]
    rows += [_Row(title, _seen(frames, sample, clip, grid, patches)) for title, sample in samples.items()]
    return _draw_rows(rows, tubelet_size)


def animation(
    video: Tensor,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    *,
    normalize: bool,
    statistics: Statistics = "true",
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    clip: int = 0,
) -> Tensor:
    """The panels of `overview` side by side, frame after frame (supplement, section K): [T, height, width, 3] uint8.

    It takes the arguments of `overview`. `save_animation` writes the result.
    """
    patches = PatchFormat.of(patch_size, tubelet_size, normalize)
    rows = _rows(video, prediction, sample, token_error, patches, statistics, clip)
    limits = {row.title: (float(row.images.min()), float(row.images.max())) for row in rows}
    frames = range(video.shape[2])
    return torch.stack(
        [_draw_panels([_Row(row.title, row.images[t : t + 1], row.colours) for row in rows], limits) for t in frames]
    )


def save_animation(frames: Tensor, path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Writes [T, H, W, 3] uint8 frames as a .gif (with Pillow) or an .mp4 (with PyAV, which must be installed).

    Raises:
        ValueError: the suffix is another, or the frames have another dtype or shape.
    """
    path = Path(path)
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 [T, H, W, 3].")
    if path.suffix == ".gif":
        images = [Image.fromarray(frame.cpu().numpy()) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    elif path.suffix == ".mp4":
        import av

        height, width = (size // 2 * 2 for size in frames.shape[1:3])  # H.264 takes even sizes
        with av.open(os.fspath(path), "w") as container:
            stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in frames[:, :height, :width].cpu():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")))
            container.mux(stream.encode(None))
    else:
        raise ValueError(f"{path} has another suffix than expected; name a .gif or .mp4 file.")


def _rows(
    video: Tensor,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    patches: PatchFormat,
    statistics: Statistics,
    clip: int,
) -> list[_Row]:
    """The rows of a clip, with an image for each of its frames."""
    frames, grid, tubelet_size = _frames(video, clip), patches.grid(video.shape), patches.patch[0]
    shown = _predicted(prediction, video, sample, patches, statistics)
    error = torch.zeros(sample.num_tokens).scatter(
        0, sample.masked_idx[clip].cpu(), token_error[clip].detach().float().cpu()
    )
    return [
        _Row("video", frames),
        _Row(_LABELS[statistics] if patches.normalize else "prediction", shown[clip].permute(1, 2, 3, 0).cpu()),
        _Row(f"error\n0 to {float(error.max()):.2g}", error.view(grid).repeat_interleave(tubelet_size, 0), "magma"),
        *_score_row(sample, clip, grid, tubelet_size),
        _Row(
            f"mask\n{sample.num_tokens - sample.num_visible} of {sample.num_tokens}\ntokens masked",
            _seen(frames, sample, clip, grid, patches),
        ),
    ]


def _frames(video: Tensor, clip: int) -> Tensor:
    """[T, H, W, C] of one clip, on the CPU."""
    if video.shape[1] not in (1, 3):
        raise ValueError(f"video has {video.shape[1]} channels, expected 1 (grey) or 3 (RGB).")
    return video[clip].permute(1, 2, 3, 0).cpu()


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
    return torch.where(pixels[..., None], (frames.float() * 0.15).to(torch.uint8), frames)


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
    canvas = FigureCanvasAgg(figure)
    for panel, cell in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _colour_map(panel, limits[panel.title])(cell, panel.images[0])
        cell.set_title(panel.title, fontsize=8)
        cell.set_axis_off()
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
