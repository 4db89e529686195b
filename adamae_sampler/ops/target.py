"""reconstruction_target: the pixels of each token, normalised or raw, that a decoder has to predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adamae_sampler.ops.checks import at_least_fp32, check_indices, check_target
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.pixel_rows import patch_rows

Kind = Literal["mse", "l1"]
STD_EPS = 1e-6  # added to the standard deviation, not the variance, as VideoMAE and AdaMAE do


def check_kind(kind: str) -> None:
    """Raises ValueError for an unknown kind of error."""
    if kind not in ("mse", "l1"):
        raise ValueError(f"kind={kind!r}, expected 'mse' or 'l1'.")


def epsilons(video: Tensor, patches: PatchFormat) -> list[float]:
    """For each channel, the epsilon to add to the standard deviation of a patch.

    Targets are normalised from the video's values, which are not first turned into pixels in [0, 1]. That step would
    scale mean and deviation alike and change only the share of the epsilon, so the epsilon is scaled instead.
    """
    if video.dtype == torch.uint8:
        return [255 * STD_EPS] * video.shape[1]
    if patches.std is None:
        return [STD_EPS] * video.shape[1]
    return [STD_EPS / scale for scale in patches.std]


def target_reference(video: Tensor, idx: Tensor | None, patches: PatchFormat) -> Tensor:
    """The values to predict [B R, M, C, pixels], fp32 or fp64, channel by channel, in memory order."""
    rows = patch_rows(video, idx, patches)
    pixels = at_least_fp32(rows).unflatten(-1, (video.shape[1], -1))
    if patches.normalize:
        pixels = pixels - pixels.mean(-1, keepdim=True)
        # `var` takes ten times as long on a CPU. The epsilons are plain numbers: a tensor of them would be copied to
        # the device, and the host would wait.
        deviation = torch.linalg.vector_norm(pixels, dim=-1) / math.sqrt(pixels.shape[-1] - 1)  # [B, M, C]
        by_channel = zip(deviation.unbind(-1), epsilons(video, patches), strict=True)
        return pixels / torch.stack([x + eps for x, eps in by_channel], dim=-1)[..., None]
    if video.dtype == torch.uint8:
        return pixels / 255
    if patches.mean is not None and patches.std is not None:
        channels = zip(pixels.unbind(-2), patches.mean, patches.std, strict=True)
        return torch.stack([x * scale + shift for x, shift, scale in channels], dim=-2)
    return pixels


def reconstruction_target(
    video: Tensor,
    idx: Tensor | None = None,
    *,
    normalize: bool = True,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The pixels that a decoder has to predict, by default normalised per patch and channel.

    Args:
        video: [B, C, T, H, W]. uint8 pixels are divided by 255. Floating-point values stay as they are; with `mean` and
            `std` they are turned back into pixels first.
        idx: [B, M] int64, or [B R, M] for R masks of each clip, the tokens to take; None takes all N.
        normalize: whether to subtract each patch's mean and divide by its (unbiased) standard deviation + 1e-6, for
            each channel separately. False gives raw pixels.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means by which the floating-point video was normalised, if it was.
        std: the standard deviations that go with `mean`.

    Returns:
        [B R, M, P] fp32, P = tubelet_size * p1 * p2 * C, laid out (t p1 p2 c).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a size that patches do not divide, or `mean` and `std`
            that do not fit each other, the channels or the dtype.
    """
    return target_rows(video, idx, PatchFormat.of(patch_size, tubelet_size, normalize, mean, std))


@torch.no_grad()
def target_rows(video: Tensor, idx: Tensor | None, patches: PatchFormat) -> Tensor:
    """`reconstruction_target` of a given format."""
    num_tokens = check_target(video, patches)
    if idx is not None:
        check_indices("idx", idx, video.shape[0], num_tokens, video.device, several=True)
    return target_reference(video, idx, patches).transpose(-1, -2).flatten(-2)
