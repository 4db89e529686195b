"""Pictures of what a masked autoencoder sees and predicts. Needs matplotlib; import this module by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops import reconstruction_target, unpatchify
from adamae_sampler.ops.patches import PatchSize, patch_pair, token_grid
from adamae_sampler.ops.reconstruction_error import STD_EPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def predicted_video(
    prediction: Tensor,
    video: Tensor,
    sample: MaskSample,
    *,
    normalize: bool,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
) -> Tensor:
    """The clip with its masked patches predicted and its visible ones as they are.

    With a normalised target the decoder knows neither brightness nor contrast of a patch. Here they are taken from
    the true patch, which makes the picture readable and better than the model: say so where you show it.

    Args:
        prediction: [B, M, P].
        video: [B, C, T, H, W] uint8.
        sample: the mask.
        normalize: whether the target was normalised per patch and channel.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.

    Returns:
        [B, C, T, H, W] in [0, 1].
    """
    pixels = reconstruction_target(
        video, normalize=False, patch_size=patch_size, tubelet_size=tubelet_size
    )  # [B, N, P]
    masked_idx = sample.masked_idx[..., None].expand(-1, -1, pixels.shape[2])
    predicted = prediction.detach().float()
    if normalize:
        channels = video.shape[1]
        true = pixels.gather(1, masked_idx).unflatten(-1, (-1, channels))  # [B, M, pixels, C]
        variance, mean = torch.var_mean(true, dim=-2, keepdim=True)
        predicted = (predicted.unflatten(-1, (-1, channels)) * (variance.sqrt() + STD_EPS) + mean).flatten(-2)
    filled = pixels.scatter(1, masked_idx, predicted)
    grid = token_grid(tuple(video.shape), patch_size, tubelet_size)
    return unpatchify(filled, grid, patch_size, tubelet_size).clamp(0, 1)


def overview(
    video: Tensor,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    *,
    normalize: bool,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    clip: int = 0,
) -> Figure:
    """One clip as rows of frames: video, p, mask, prediction, error (the paper's Figures 2 to 10).

    A column is a time step, shown by the first frame of its tubelet.

    Args:
        video: [B, C, T, H, W] uint8 with one or three channels.
        prediction: [B, M, P].
        sample: the mask; the row of p is left out if it has no log_probs.
        token_error: [B, M], the error of each masked token.
        normalize: whether the target was normalised per patch and channel.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        clip: which of the B clips.
    """
    if video.shape[1] not in (1, 3):
        raise ValueError(f"video has {video.shape[1]} channels; pictures can be made of 1 (grey) or 3 (RGB).")
    grid = token_grid(tuple(video.shape), patch_size, tubelet_size)
    shown = predicted_video(
        prediction, video, sample, normalize=normalize, patch_size=patch_size, tubelet_size=tubelet_size
    )
    frames = video[clip, :, ::tubelet_size].permute(1, 2, 3, 0).cpu()  # [steps, H, W, C]
    predicted = shown[clip, :, ::tubelet_size].permute(1, 2, 3, 0).cpu()
    mask = sample.mask[clip].view(grid).cpu()
    error = torch.zeros(sample.num_tokens).scatter(0, sample.masked_idx[clip].cpu(), token_error[clip].detach().cpu())

    hidden = (frames.float() * 0.15).to(torch.uint8)
    seen = torch.where(_spread(mask, patch_size)[..., None], hidden, frames)
    note = "prediction\n(each patch's true\nmean and contrast)" if normalize else "prediction"
    rows: list[tuple[str, Tensor, str | None]] = [
        ("video", frames, None),
        ("mask", seen, None),
        (note, predicted, None),
        ("error", error.view(grid), "magma"),
    ]
    if sample.log_probs is not None:
        rows.insert(1, ("p", sample.log_probs[clip].detach().exp().view(grid).cpu(), "jet"))
    return _draw_rows(rows)


def _spread(tokens: Tensor, patch_size: PatchSize) -> Tensor:
    """[T, H, W] tokens -> [T, H p1, W p2] pixels."""
    p1, p2 = patch_pair(patch_size)
    return tokens.repeat_interleave(p1, 1).repeat_interleave(p2, 2)


def _draw_rows(rows: list[tuple[str, Tensor, str | None]]) -> Figure:
    columns = rows[0][1].shape[0]
    height, width = rows[0][1].shape[1:3]
    spacing = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(1.5 * columns + 1.2, 1.5 * len(rows) * height / width), layout=spacing)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (title, images, colours), line in zip(rows, axes, strict=True):
        show = _colour_map(images, colours)
        for image, cell in zip(images, line, strict=True):
            show(cell, image)
            cell.set_xticks([])
            cell.set_yticks([])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def _colour_map(images: Tensor, colours: str | None) -> Callable[[Axes, Tensor], object]:
    """How to draw one image of a row; maps share one scale, so that its frames compare."""
    if colours is None:
        top = 1 if images.is_floating_point() else 255  # for grey ones; matplotlib takes RGB as it is
        return lambda cell, image: cell.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=top)
    low, high = float(images.min()), float(images.max())
    return lambda cell, image: cell.imshow(image.numpy(), cmap=colours, vmin=low, vmax=high)
