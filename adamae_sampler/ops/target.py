"""What a decoder is asked to predict: the pixels of each token, normalised or raw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adamae_sampler.ops.checks import at_least_fp32, check_target, check_video_indices
from adamae_sampler.ops.patches import PatchSize, patch_pair
from adamae_sampler.ops.pixel_rows import patch_rows

Kind = Literal["mse", "l1"]
STD_EPS = 1e-6  # added to the standard deviation, not the variance, as VideoMAE and AdaMAE do


class Target(NamedTuple):
    """What a prediction is compared with, but for the video.

    Attributes:
        kind: "mse" or "l1".
        normalize: see `reconstruction_target`, as for `mean` and `std`.
        patch: frames, height and width of a patch.
        mean: see there.
        std: see there.
    """

    kind: str
    normalize: bool
    patch: list[int]
    mean: list[float] | None
    std: list[float] | None

    @classmethod
    def of(
        cls,
        kind: str,
        normalize: bool,
        patch_size: PatchSize,
        tubelet_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> Target:
        """From the arguments of `reconstruction_error`."""
        patch = [tubelet_size, *patch_pair(patch_size)]
        return cls(kind, normalize, patch, None if mean is None else list(mean), None if std is None else list(std))

    def epsilons(self, video: Tensor) -> list[float]:
        """Of each channel, beside the deviation of the video's values as they are: un-normalising them, or dividing
        them by 255, would change nothing else of a normalised target."""
        if video.dtype == torch.uint8:
            return [255 * STD_EPS] * video.shape[1]
        return [STD_EPS / scale for scale in self.std or [1.0] * video.shape[1]]


def target_reference(video: Tensor, idx: Tensor | None, target: Target) -> Tensor:
    """[B R, M, C, pixels], fp32 or fp64: what to predict, each channel by itself, as its pixels lie in memory."""
    rows = patch_rows(video, idx, target.patch)
    pixels = at_least_fp32(rows).unflatten(-1, (video.shape[1], -1))
    if target.normalize:
        pixels = pixels - pixels.mean(-1, keepdim=True)
        # `var` takes ten times as long on a CPU. Numbers for each channel, not a tensor of them, which would be copied
        # to the device and waited for.
        deviation = torch.linalg.vector_norm(pixels, dim=-1) / math.sqrt(pixels.shape[-1] - 1)  # [B, M, C]
        by_channel = zip(deviation.unbind(-1), target.epsilons(video), strict=True)
        return pixels / torch.stack([x + eps for x, eps in by_channel], dim=-1)[..., None]
    if video.dtype == torch.uint8:
        return pixels / 255
    if target.mean is not None and target.std is not None:
        channels = zip(pixels.unbind(-2), target.mean, target.std, strict=True)
        return torch.stack([x * scale + shift for x, shift, scale in channels], dim=-2)
    return pixels


@torch.no_grad()
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
    """What a decoder is asked to predict: pixels, by default normalised per patch and channel.

    Args:
        video: [B, C, T, H, W]. uint8 is taken as pixels and divided by 255; floating point is taken as it is, or
            un-normalised with `mean` and `std` first.
        idx: [B, M] int64, the tokens wanted, or [B R, M] for R masks of each clip; all N if None.
        normalize: subtract each patch's mean and divide by its (unbiased) standard deviation + 1e-6, for each
            channel apart; False gives raw pixels.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means that the floating-point video was normalised with, if it was.
        std: the standard deviations that go with `mean`.

    Returns:
        [B R, M, P] fp32, P = tubelet_size * p1 * p2 * C, laid out (t p1 p2 c).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a size that patches do not divide, or `mean` and `std`
            that do not fit each other, the channels or the dtype.
    """
    check_target(video, patch_size, tubelet_size, normalize, mean, std)
    if idx is not None:
        check_video_indices("idx", video, idx, patch_size, tubelet_size)
    target = target_reference(video, idx, Target.of("mse", normalize, patch_size, tubelet_size, mean, std))
    return target.transpose(-1, -2).flatten(-2)
