"""reconstruction_error: how far each masked token's prediction is from its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from adamae_sampler.ops.checks import at_least_fp32, check_device, check_floating, check_indices
from adamae_sampler.ops.gather_tokens import select_rows
from adamae_sampler.ops.patches import PatchSize, patch_pair, patchify, token_grid

Kind = Literal["mse", "l1"]
STD_EPS = 1e-6  # added to the standard deviation, not the variance, as VideoMAE and AdaMAE do


def _reconstruction_error_reference(prediction: Tensor, target: Tensor, kind: Kind) -> Tensor:
    difference = at_least_fp32(prediction) - target
    return (difference.square() if kind == "mse" else difference.abs()).mean(-1)


def _target_reference(
    video: Tensor,
    idx: Tensor | None,
    patch_size: PatchSize,
    tubelet_size: int,
    normalize: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    patches = patchify(video, patch_size, tubelet_size)
    if idx is not None:
        patches = select_rows(patches, idx)  # before the arithmetic, which then runs on masked tokens alone
    pixels = patches.unflatten(-1, (-1, video.shape[1]))  # [B, M, pixels, C]
    pixels = pixels.float() / 255 if video.dtype == torch.uint8 else at_least_fp32(pixels)
    if mean is not None and std is not None:
        # One scalar for each channel: a tensor of them would be copied to the device and waited for.
        channels = zip(pixels.unbind(-1), mean, std, strict=True)
        pixels = torch.stack([x * scale + shift for x, shift, scale in channels], dim=-1)
    if normalize:
        centre_var, centre = torch.var_mean(pixels, dim=-2, correction=1, keepdim=True)
        pixels = (pixels - centre) / (centre_var.sqrt() + STD_EPS)
    return pixels.flatten(-2)


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
        idx: [B, M] int64, the tokens wanted; all N if None.
        normalize: subtract each patch's mean and divide by its (unbiased) standard deviation + 1e-6, for each
            channel apart; False gives raw pixels.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means that the floating-point video was normalised with, if it was.
        std: the standard deviations that go with `mean`.

    Returns:
        [B, M, P] fp32, P = tubelet_size * p1 * p2 * C, laid out (t p1 p2 c).

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a size that patches do not divide, or `mean` and `std`
            that do not fit each other, the channels or the dtype.
    """
    _check_video(video, patch_size, tubelet_size, normalize, mean, std)
    if idx is not None:
        _check_target_indices(video, idx, patch_size, tubelet_size)
    return _target_reference(video, idx, patch_size, tubelet_size, normalize, mean, std)


def reconstruction_error(
    prediction: Tensor,
    video: Tensor,
    masked_idx: Tensor,
    *,
    kind: Kind = "mse",
    normalize: bool = True,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """e_i, the mean squared (or absolute) difference of each masked token's prediction from its target.

    Args:
        prediction: [B, M, P], in the order of `masked_idx`; its gradient is the only one.
        video: [B, C, T, H, W], see `reconstruction_target`, as for all further arguments.
        masked_idx: [B, M] int64.
        kind: "mse" or "l1".
        normalize: see `reconstruction_target`.
        patch_size: see `reconstruction_target`.
        tubelet_size: see `reconstruction_target`.
        mean: see `reconstruction_target`.
        std: see `reconstruction_target`.

    Returns:
        [B, M] fp32, also under autocast.

    Raises:
        TypeError, ValueError: as `reconstruction_target`; an unknown kind; a prediction whose shape does not
            fit the video, the mask or the patch size.
    """
    if kind not in ("mse", "l1"):
        raise ValueError(f"kind={kind!r}, expected 'mse' or 'l1'.")
    check_floating("prediction", prediction)
    check_device("prediction", prediction, video.device)
    _check_video(video, patch_size, tubelet_size, normalize, mean, std)
    p1, p2 = patch_pair(patch_size)
    expected = (*masked_idx.shape, tubelet_size * p1 * p2 * video.shape[1])
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected {expected}: clips, masked tokens, and "
            f"{tubelet_size}x{p1}x{p2} pixels of {video.shape[1]} channels. Check patch_size and tubelet_size; a "
            "decoder that predicts all tokens must be cut to the masked ones first."
        )
    _check_target_indices(video, masked_idx, patch_size, tubelet_size)
    with torch.no_grad():
        target = _target_reference(video, masked_idx, patch_size, tubelet_size, normalize, mean, std)
    return _reconstruction_error_reference(prediction, target, kind)


def _check_target_indices(video: Tensor, idx: Tensor, patch_size: PatchSize, tubelet_size: int) -> None:
    t, h, w = token_grid(tuple(video.shape), patch_size, tubelet_size)
    check_indices("masked_idx", idx, video.shape[0], t * h * w, video.device)


def _check_video(
    video: Tensor,
    patch_size: PatchSize,
    tubelet_size: int,
    normalize: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    token_grid(tuple(video.shape), patch_size, tubelet_size)
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video has dtype {video.dtype}, expected uint8 pixels or floating point.")
    p1, p2 = patch_pair(patch_size)
    if normalize and tubelet_size * p1 * p2 < 2:
        raise ValueError("a patch of one pixel has no standard deviation; use normalize=False.")
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean} and std={std}: give both or neither.")
    if mean is not None and std is not None:
        if video.dtype == torch.uint8:
            raise ValueError("video is uint8, which is pixels already: leave mean and std out.")
        if not len(mean) == len(std) == video.shape[1]:
            raise ValueError(f"mean has {len(mean)} values, std {len(std)}, the video {video.shape[1]} channels.")
