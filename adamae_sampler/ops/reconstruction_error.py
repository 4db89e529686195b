"""reconstruction_error: how far each masked token's prediction is from its pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import (
    at_least_fp32,
    check_device,
    check_floating,
    check_index_shape,
    check_indices,
    check_video,
)
from adamae_sampler.ops.gather_tokens import select_rows
from adamae_sampler.ops.patches import PatchSize, patch_pair, patchify, token_grid

Kind = Literal["mse", "l1"]
STD_EPS = 1e-6  # added to the standard deviation, not the variance, as VideoMAE and AdaMAE do
_MOST_PIXELS = 8192  # of a patch that one program holds; a larger patch takes the reference
_MOST_MEANS = 4  # channels whose mean and std the kernel takes

# ---------------------------------------------------------------------------------------------------- reference


def _reconstruction_error_reference(prediction: Tensor, target: Tensor, kind: Kind) -> Tensor:
    loss = F.mse_loss if kind == "mse" else F.l1_loss
    prediction = prediction.to(torch.promote_types(prediction.dtype, target.dtype))  # a target is fp32 or fp64
    return loss(prediction, target, reduction="none").mean(-1)


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
    # Numbers for each channel, not a tensor of them, which would be copied to the device and waited for.
    if normalize:
        variance, centre = torch.var_mean(pixels, dim=-2, correction=1, keepdim=True)  # [B, M, 1, C]
        deviation = variance.sqrt()
        # Un-normalising the pixels first would change nothing but the weight of the epsilon beside their deviation.
        eps = [STD_EPS] * video.shape[1] if std is None else [STD_EPS / scale for scale in std]
        deviation = torch.stack([x + each for x, each in zip(deviation.unbind(-1), eps, strict=True)], dim=-1)
        pixels = (pixels - centre) / deviation
    elif mean is not None and std is not None:
        channels = zip(pixels.unbind(-1), mean, std, strict=True)
        pixels = torch.stack([x * scale + shift for x, shift, scale in channels], dim=-1)
    return pixels.flatten(-2)


# ------------------------------------------------------------------------------------------------------- kernel


# Neighbouring lanes are to take neighbouring pixels, since a pixel's channels lie apart in the video and together in
# the prediction: a stride of 1 known to the compiler would give each lane a run of pixels, and its loads of the
# prediction 32 cache lines each.
@jit(do_not_specialize=["video_stride_w"])
def _error_kernel(
    prediction_ptr,
    video_ptr,
    masked_idx_ptr,
    grad_error_ptr,
    out_ptr,
    N,
    M,
    R,
    TOKENS_HW,
    TOKENS_W,
    prediction_stride_b,
    prediction_stride_m,
    prediction_stride_p,
    video_stride_b,
    video_stride_c,
    video_stride_t,
    video_stride_h,
    video_stride_w,
    masked_idx_stride_b,
    masked_idx_stride_m,
    grad_error_stride_b,
    grad_error_stride_m,
    mean_0,
    mean_1,
    mean_2,
    mean_3,
    std_0,
    std_1,
    std_2,
    std_3,
    BACKWARD: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STD_EPS: tl.constexpr,
    UN_NORMALIZE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    C: tl.constexpr,
    TUBELET: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program, one masked token: its error, or the gradient of its prediction; NaN if its index is out of range.

    The target is made here from the token's pixels, channel by channel, and never stored. Blocks run over a patch's
    (t p1 p2), padded to a power of two.
    """
    NUM_PIXELS: tl.constexpr = TUBELET * P1 * P2
    drawn = (tl.program_id(0) // M).to(tl.int64)  # a mask, of which each clip has R
    place = (tl.program_id(0) % M).to(tl.int64)
    index = tl.load(masked_idx_ptr + drawn * masked_idx_stride_b + place * masked_idx_stride_m)
    exists = (index >= 0) & (index < N)
    token = index.to(tl.int32)
    pixel = tl.arange(0, PIXELS)
    inside = pixel < NUM_PIXELS
    found = pixel < tl.where(exists, NUM_PIXELS, 0)

    t = token // TOKENS_HW * TUBELET + pixel // (P1 * P2)
    h = token % TOKENS_HW // TOKENS_W * P1 + pixel // P2 % P1
    w = token % TOKENS_W * P2 + pixel % P2
    video_ptr += drawn // R * video_stride_b
    video_place = t.to(tl.int64) * video_stride_t + h.to(tl.int64) * video_stride_h + w.to(tl.int64) * video_stride_w
    prediction_ptr += drawn * prediction_stride_b + place * prediction_stride_m
    if BACKWARD:
        upstream = tl.load(grad_error_ptr + drawn * grad_error_stride_b + place * grad_error_stride_m).to(tl.float32)
        upstream = tl.where(exists, upstream, float("nan")) / (NUM_PIXELS * C)
    total = tl.zeros((PIXELS,), tl.float32)

    for c in tl.static_range(C):
        value = tl.load(video_ptr + tl.cast(c, tl.int64) * video_stride_c + video_place, mask=found, other=0).to(
            tl.float32
        )
        if IS_UINT8:
            value = value * (1.0 / 255.0)
        if UN_NORMALIZE:  # numbers, not a tensor of them, which would be copied to the device and waited for
            std = std_0 if c == 0 else std_1 if c == 1 else std_2 if c == 2 else std_3
            mean = mean_0 if c == 0 else mean_1 if c == 1 else mean_2 if c == 2 else mean_3
            value = value * std + mean
        if NORMALIZE:
            centre = tl.sum(tl.where(inside, value, 0.0)) / NUM_PIXELS
            value = value - centre
            variance = tl.sum(tl.where(inside, value * value, 0.0)) / (NUM_PIXELS - 1)
            value = value * (1.0 / (tl.sqrt(variance) + STD_EPS))
        column = pixel * C + c
        prediction = tl.load(prediction_ptr + column * prediction_stride_p, mask=inside, other=0.0).to(tl.float32)
        difference = prediction - value
        if BACKWARD:
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference * 0.0))  # NaN stays NaN
            grad = upstream * (2 * difference if SQUARED else sign)
            row = (drawn * M + place) * (NUM_PIXELS * C)
            tl.store(out_ptr + row + column, grad.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            total += tl.where(inside, difference * difference if SQUARED else tl.abs(difference), 0.0)
    if not BACKWARD:
        error = tl.where(exists, tl.sum(total), float("nan")) / (NUM_PIXELS * C)
        tl.store(out_ptr + drawn * M + place, error)


# ---------------------------------------------------------------------------------------------------- operators


def _obstacle(patch: list[int], mean: Sequence[float] | None) -> str:
    if math.prod(patch) > _MOST_PIXELS:
        return f"the kernel takes patches of up to {_MOST_PIXELS} pixels, not {'x'.join(map(str, patch))}"
    if mean is not None and len(mean) > _MOST_MEANS:
        return f"the kernel takes the mean and std of up to {_MOST_MEANS} channels, not {len(mean)}"
    return ""


def _padded(values: list[float] | None) -> list[float]:
    return [*(values or []), *[0.0] * _MOST_MEANS][:_MOST_MEANS]


def _launch(
    prediction: Tensor,
    video: Tensor,
    masked_idx: Tensor,
    grad_error: Tensor | None,
    out: Tensor,
    kind: str,
    normalize: bool,
    patch: list[int],
    mean: list[float] | None,
    std: list[float] | None,
) -> None:
    (draws, num_masked), (batch, channels) = masked_idx.shape, video.shape[:2]
    tubelet, p1, p2 = patch
    tokens_t, tokens_h, tokens_w = token_grid(tuple(video.shape), (p1, p2), tubelet)
    pixels = next_power_of_2(math.prod(patch))
    launch(
        _error_kernel,
        draws * num_masked,
        prediction,
        video,
        masked_idx,
        grad_error,
        out,
        tokens_t * tokens_h * tokens_w,
        num_masked,
        draws // max(batch, 1),
        tokens_h * tokens_w,
        tokens_w,
        *prediction.stride(),
        *video.stride(),
        *masked_idx.stride(),
        *((0, 0) if grad_error is None else grad_error.stride()),
        *_padded(mean),
        *_padded(std),
        BACKWARD=grad_error is not None,
        SQUARED=kind == "mse",
        NORMALIZE=normalize,
        STD_EPS=STD_EPS,
        UN_NORMALIZE=mean is not None,
        IS_UINT8=video.dtype == torch.uint8,
        C=channels,
        TUBELET=tubelet,
        P1=p1,
        P2=p2,
        PIXELS=pixels,
        num_warps=max(1, min(pixels // 512, 8)),  # one warp for 2x16x16 pixels: sums then need no barrier
    )


# Spelt out, since torch 2.6 does not infer lists. `patch` is (tubelet, height, width).
_HOW = "str kind, bool normalize, int[] patch, float[]? mean, float[]? std"


@torch.library.custom_op(
    "adamae_sampler::reconstruction_error",
    mutates_args=(),
    schema=f"(Tensor prediction, Tensor video, Tensor masked_idx, {_HOW}) -> Tensor",
)
def _error_op(prediction: Tensor, video: Tensor, masked_idx: Tensor, *how: Any) -> Tensor:
    error = prediction.new_empty(masked_idx.shape, dtype=torch.float32)
    _launch(prediction, video, masked_idx, None, error, *how)
    return error


@_error_op.register_fake
def _(prediction: Tensor, video: Tensor, masked_idx: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(masked_idx.shape, dtype=torch.float32)


@torch.library.custom_op(
    "adamae_sampler::reconstruction_error_backward",
    mutates_args=(),
    schema=f"(Tensor grad_error, Tensor prediction, Tensor video, Tensor masked_idx, {_HOW}) -> Tensor",
)
def _error_backward_op(grad_error: Tensor, prediction: Tensor, video: Tensor, masked_idx: Tensor, *how: Any) -> Tensor:
    grad = prediction.new_empty(prediction.shape)
    _launch(prediction, video, masked_idx, grad_error, grad, *how)
    return grad


@_error_backward_op.register_fake
def _(grad_error: Tensor, prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.how = inputs[3:]


def _backward(ctx: Any, grad_error: Tensor) -> tuple[Tensor | None, ...]:
    return _error_backward_op(grad_error, *ctx.saved_tensors, *ctx.how), *[None] * 7


_error_op.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------------------------------------------- public


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
    check_video(video, patch_size, tubelet_size, normalize, mean, std)
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
        prediction: [B R, M, P], in the order of `masked_idx`; its gradient is the only one.
        video: [B, C, T, H, W], see `reconstruction_target`, as for all further arguments.
        masked_idx: [B R, M] int64, R rows after each other for each clip.
        kind: "mse" or "l1".
        normalize: see `reconstruction_target`.
        patch_size: see `reconstruction_target`.
        tubelet_size: see `reconstruction_target`.
        mean: see `reconstruction_target`.
        std: see `reconstruction_target`.

    Returns:
        [B R, M] fp32, also under autocast.

    Raises:
        TypeError, ValueError: as `reconstruction_target`; an unknown kind; a prediction whose shape does not
            fit the video, the mask or the patch size.
    """
    if kind not in ("mse", "l1"):
        raise ValueError(f"kind={kind!r}, expected 'mse' or 'l1'.")
    check_floating("prediction", prediction)
    check_video(video, patch_size, tubelet_size, normalize, mean, std)
    check_device("prediction", prediction, video.device)
    check_index_shape("masked_idx", masked_idx, video.shape[0], video.device, several=True)
    p1, p2 = patch_pair(patch_size)
    expected = (*masked_idx.shape, tubelet_size * p1 * p2 * video.shape[1])
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected {expected}: clips, masked tokens, and "
            f"{tubelet_size}x{p1}x{p2} pixels of {video.shape[1]} channels. Check patch_size and tubelet_size; a "
            "decoder that predicts all tokens must be cut to the masked ones first, and one that predicts a part of "
            "them goes with sample.target_idx."
        )
    _check_target_indices(video, masked_idx, patch_size, tubelet_size)
    patch = [tubelet_size, p1, p2]
    floating = (prediction, video) if video.is_floating_point() else (prediction,)
    if backend_for(*floating, obstacle=_obstacle(patch, mean)) == "triton":
        how = (kind, normalize, patch, None if mean is None else list(mean), None if std is None else list(std))
        error: Tensor = _error_op(prediction, video.detach(), masked_idx, *how)
        return error
    with torch.no_grad():
        target = _target_reference(video, masked_idx, patch_size, tubelet_size, normalize, mean, std)
    return _reconstruction_error_reference(prediction, target, kind)


def _check_target_indices(video: Tensor, idx: Tensor, patch_size: PatchSize, tubelet_size: int) -> None:
    t, h, w = token_grid(tuple(video.shape), patch_size, tubelet_size)
    check_indices("masked_idx", idx, video.shape[0], t * h * w, video.device, several=True)
