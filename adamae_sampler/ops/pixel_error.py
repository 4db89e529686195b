"""reconstruction_error: the distance between the prediction and the pixels of each masked token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import (
    check_device,
    check_floating,
    check_index_shape,
    check_indices,
    check_target,
)
from adamae_sampler.ops.interleave import by_channel, by_pixel
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.pixel_rows import channel_arguments, channel_obstacle, patch_obstacle, pixel_offsets
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.target import Kind, check_kind, epsilons, target_reference

# ---------------------------------------------------------------------------------------------------- reference


def error_reference(
    prediction: Tensor, video: Tensor, idx: Tensor, kind: str, patches: PatchFormat
) -> tuple[Tensor, Tensor]:
    """The error [B, M], and its unit gradient [B, M, P] in the prediction's dtype, see `_error_op`."""
    wanted = target_reference(video, idx, patches)
    by_channel = prediction.unflatten(-1, (-1, video.shape[1])).transpose(-1, -2)  # (t p1 p2 c) to [.., C, pixels]
    unit = (by_channel - wanted).transpose(-1, -2).flatten(-2)
    if kind == "mse":
        error = torch.linalg.vector_norm(unit, dim=-1).square() / unit.shape[-1]
    else:
        error, unit = unit.abs().mean(-1), unit.sign()
    return error, unit.to(prediction.dtype)


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _difference(
    prediction,
    video_ptr,
    inside,
    exists,
    scale,
    shift,
    NORMALIZE: tl.constexpr,
    SCALED: tl.constexpr,
    NUM_PIXELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One channel's prediction minus its target, computed from the token's pixels; NaN if the token does not exist."""
    PADDED: tl.constexpr = PIXELS != NUM_PIXELS
    value = tl.load(video_ptr, mask=inside & exists, other=0).to(tl.float32)
    keep = tl.where(exists, 1.0, float("nan"))
    if NORMALIZE:
        value -= tl.sum(value) / NUM_PIXELS
        if PADDED:
            value = tl.where(inside, value, 0.0)
        variance = tl.sum(value * value) / (NUM_PIXELS - 1)
        value *= keep / (tl.sqrt(variance) + scale)  # the epsilon
    elif SCALED:
        value = value * (scale * keep) + shift
    else:
        value *= keep
    value = prediction.to(tl.float32) - value
    return tl.where(inside, value, 0.0) if PADDED else value


@jit
def _unit(difference, SQUARED: tl.constexpr):
    if SQUARED:
        return difference
    sign = tl.where(difference < 0, -1.0, difference * 0.0)  # NaN stays NaN
    return tl.where(difference > 0, 1.0, sign)


@jit
def _error_kernel(
    prediction_ptr,
    video_ptr,
    idx_ptr,
    error_ptr,
    unit_ptr,
    N,
    M,
    R,
    TOKENS_HW,
    TOKENS_W,
    prediction_stride_b,
    prediction_stride_m,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    shift_0,
    shift_1,
    shift_2,
    shift_3,
    GRADIENT: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    TUBELET: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program computes the error of one masked token, and with GRADIENT the unit gradient of its prediction. Both
    are NaN if the token's index is out of range. The gradient may overwrite the prediction.

    The target is computed channel by channel and never stored. Blocks run over a patch's (t p1 p2), padded to a power
    of two.
    """
    NUM_PIXELS: tl.constexpr = TUBELET * P1 * P2
    row = tl.program_id(0).to(tl.int64)
    drawn = row // M  # index of the mask; each clip has R masks
    index = tl.load(idx_ptr + row)
    exists = (index >= 0) & (index < N)
    pixel = tl.arange(0, PIXELS)
    inside = pixel < NUM_PIXELS
    offset = pixel_offsets(
        index.to(tl.int32), pixel, TOKENS_HW, TOKENS_W, stride_t, stride_h, stride_w, TUBELET, P1, P2
    )
    video_ptr += drawn // R * stride_b + offset
    prediction_ptr += drawn * prediction_stride_b + row % M * prediction_stride_m
    unit_ptr += row * (NUM_PIXELS * C)
    UNIT: tl.constexpr = unit_ptr.dtype.element_ty

    if (C == 3 and NUM_PIXELS == PIXELS) and PIXELS >= 16:  # a thread has whole pixels; loads and stores are 16 bytes
        ROWS: tl.constexpr = PIXELS // 16
        place = pixel // 16 * 48 + pixel % 16
        a = tl.reshape(tl.load(prediction_ptr + place), (ROWS, 16))
        b = tl.reshape(tl.load(prediction_ptr + place + 16), (ROWS, 16))
        c = tl.reshape(tl.load(prediction_ptr + place + 32), (ROWS, 16))
        x, y, z = by_channel(a, b, c)
        x, y, z = tl.reshape(x, (PIXELS,)), tl.reshape(y, (PIXELS,)), tl.reshape(z, (PIXELS,))
        x = _difference(x, video_ptr, inside, exists, scale_0, shift_0, NORMALIZE, SCALED, NUM_PIXELS, PIXELS)
        video_ptr += stride_c
        y = _difference(y, video_ptr, inside, exists, scale_1, shift_1, NORMALIZE, SCALED, NUM_PIXELS, PIXELS)
        video_ptr += stride_c
        z = _difference(z, video_ptr, inside, exists, scale_2, shift_2, NORMALIZE, SCALED, NUM_PIXELS, PIXELS)
        total = x * x + y * y + z * z if SQUARED else tl.abs(x) + tl.abs(y) + tl.abs(z)
        if GRADIENT:
            x = tl.reshape(_unit(x, SQUARED).to(UNIT), (ROWS, 16))
            y = tl.reshape(_unit(y, SQUARED).to(UNIT), (ROWS, 16))
            z = tl.reshape(_unit(z, SQUARED).to(UNIT), (ROWS, 16))
            a, b, c = by_pixel(x, y, z)
            tl.store(unit_ptr + place, tl.reshape(a, (PIXELS,)))
            tl.store(unit_ptr + place + 16, tl.reshape(b, (PIXELS,)))
            tl.store(unit_ptr + place + 32, tl.reshape(c, (PIXELS,)))
    else:
        total = tl.zeros((PIXELS,), tl.float32)
        for c in tl.static_range(C):
            scale = scale_0 if c == 0 else scale_1 if c == 1 else scale_2 if c == 2 else scale_3
            shift = shift_0 if c == 0 else shift_1 if c == 1 else shift_2 if c == 2 else shift_3
            x = tl.load(prediction_ptr + pixel * C + c, mask=inside, other=0.0)
            x = _difference(x, video_ptr, inside, exists, scale, shift, NORMALIZE, SCALED, NUM_PIXELS, PIXELS)
            video_ptr += stride_c
            total += x * x if SQUARED else tl.abs(x)
            if GRADIENT:
                tl.store(unit_ptr + pixel * C + c, _unit(x, SQUARED).to(UNIT), mask=inside)
    tl.store(error_ptr + row, tl.sum(total) / (NUM_PIXELS * C))


@jit
def _scale_rows_kernel(unit_ptr, grad_error_ptr, out_ptr, P, factor, TILE: tl.constexpr):
    """out = unit * grad_error * factor, one masked token for each program."""
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(grad_error_ptr + row).to(tl.float32) * factor
    for start in range(0, P, TILE):
        value = start + tl.arange(0, TILE)
        unit = tl.load(unit_ptr + row * P + value, mask=value < P, other=0.0)
        tl.store(
            out_ptr + row * P + value, (unit.to(tl.float32) * upstream).to(out_ptr.dtype.element_ty), mask=value < P
        )


# ---------------------------------------------------------------------------------------------------- operators


def error_obstacle(video: Tensor, patches: PatchFormat) -> str:
    """The reason why the kernel cannot take this video; empty if it can."""
    return (channel_obstacle(video) if patches.std is not None else "") or patch_obstacle(video, patches)


def launch_error(
    prediction: Tensor,
    video: Tensor,
    idx: Tensor,
    kind: str,
    patches: PatchFormat,
    error: Tensor,
    unit: Tensor | None,
) -> None:
    """Fills error [B, M], and unit [B, M, P] if it is given. `unit` may be the prediction itself."""
    (draws, num_masked), (batch, channels) = idx.shape, video.shape[:2]
    tubelet, p1, p2 = patches.patch
    tokens_t, tokens_h, tokens_w = patches.grid(video.shape)
    pixels = next_power_of_2(patches.pixels)
    scales: Sequence[float] = []  # one for each of the first four channels; further channels use the last
    shifts: Sequence[float] = []
    if patches.normalize:
        scales = epsilons(video, patches)
    elif video.dtype == torch.uint8:
        scales, shifts = [1 / 255] * channels, [0.0] * channels
    elif patches.mean is not None and patches.std is not None:
        scales, shifts = patches.std, patches.mean
    prediction = prediction if prediction.stride(-1) == 1 else prediction.contiguous()
    launch(
        _error_kernel,
        draws * num_masked,
        prediction,
        video,
        idx.contiguous(),
        error,
        error if unit is None else unit,
        tokens_t * tokens_h * tokens_w,
        num_masked,
        draws // max(batch, 1),
        tokens_h * tokens_w,
        tokens_w,
        *prediction.stride()[:2],
        *video.stride(),
        *channel_arguments(scales),
        *channel_arguments(shifts),
        GRADIENT=unit is not None,
        SQUARED=kind == "mse",
        NORMALIZE=patches.normalize,
        SCALED=bool(shifts),
        C=channels,
        TUBELET=tubelet,
        P1=p1,
        P2=p2,
        PIXELS=pixels,
        num_warps=max(1, min(pixels // 512, 8)),  # one warp for 2x16x16 pixels: sums then need no barrier
        enable_fp_fusion=True,  # the kernel's order of summation differs from the reference in any case
    )


# Operators take plain values. Their schema is written out, since torch 2.6 cannot infer lists.
HOW = "str kind, bool normalize, int[] patch, float[]? mean, float[]? std"
Plain = tuple[str, bool, Sequence[int], Sequence[float] | None, Sequence[float] | None]


def to_plain(kind: str, patches: PatchFormat) -> Plain:
    """The kind and the format as the plain values of `HOW`."""
    return kind, patches.normalize, patches.patch, patches.mean, patches.std


def from_plain(kind: str, normalize: bool, patch: Sequence[int], *statistics: Any) -> tuple[str, PatchFormat]:
    """The inverse of `to_plain`."""
    pt, p1, p2 = patch
    return kind, PatchFormat((pt, p1, p2), normalize, *statistics)


def _empty_error(prediction: Tensor, video: Tensor, idx: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    unit = prediction.new_empty(*prediction.shape) if how[-1] else prediction.new_empty(0)
    return prediction.new_empty(*idx.shape, dtype=torch.float32), unit


@operator(
    f"reconstruction_error(Tensor prediction, Tensor video, Tensor masked_idx, {HOW}, bool gradient)"
    " -> (Tensor, Tensor)",
    _empty_error,
)
def _error_op(prediction: Tensor, video: Tensor, idx: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """The error [B, M], and with `gradient` the unit gradient [B, M, P] in the dtype of the prediction.

    The unit gradient is the derivative of the error, times P / 2 for "mse" and P for "l1". It is the difference for
    "mse" and its sign for "l1"; half precision represents both well.
    """
    error, unit = _empty_error(prediction, video, idx, *how)
    launch_error(prediction, video, idx, *from_plain(*how[:-1]), error, unit if how[-1] else None)
    return error, unit


def _empty_scaled(unit: Tensor, grad_error: Tensor, factor: float) -> Tensor:
    return torch.empty_like(unit)


@operator("scale_rows(Tensor unit, Tensor grad_error, float factor) -> Tensor", _empty_scaled)
def scale_rows_op(unit: Tensor, grad_error: Tensor, factor: float) -> Tensor:
    """unit [B, M, P] times grad_error [B, M] times the factor, rounded once."""
    out = torch.empty_like(unit)
    draws, num_masked, values = unit.shape
    tile = min(next_power_of_2(values), 512)  # 16 values for each thread
    rows, grad_error = draws * num_masked, grad_error.contiguous()
    launch(_scale_rows_kernel, rows, unit, grad_error, out, values, factor, TILE=tile, num_warps=1)
    return out


class _ReconstructionError(torch.autograd.Function):
    """Runs the kernel or the reference. The forward pass computes the gradient and keeps no prediction or video."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        video: Tensor,
        idx: Tensor,
        kind: str,
        patches: PatchFormat,
        kernel: bool,
        wants: bool,
    ) -> Tensor:
        if kernel:
            error, unit = _error_op(prediction, video, idx, *to_plain(kind, patches), wants)
        else:
            error, unit = error_reference(prediction, video, idx, kind, patches)
        if wants:
            ctx.save_for_backward(unit)
            ctx.factor, ctx.kernel = (2 if kind == "mse" else 1) / unit.shape[-1], kernel
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_error: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        if ctx.kernel:
            grad = scale_rows_op(unit, grad_error, ctx.factor)
        else:
            grad = (unit * (grad_error * ctx.factor)[..., None]).to(unit.dtype)
        return grad, None, None, None, None, None, None


# ------------------------------------------------------------------------------------------------------- public


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
    """e_i, the mean squared (or absolute) difference between prediction and target of each masked token.

    Args:
        prediction: [B R, M, P], in the order of `masked_idx`. Only the prediction gets a gradient.
        video: [B, C, T, H, W], see `reconstruction_target`.
        masked_idx: [B R, M] int64, R rows for each clip, clip by clip.
        kind: "mse" or "l1".
        normalize: see `reconstruction_target`.
        patch_size: see `reconstruction_target`.
        tubelet_size: see `reconstruction_target`.
        mean: see `reconstruction_target`.
        std: see `reconstruction_target`.

    Returns:
        [B R, M] fp32, also under autocast; fp64 for fp64 predictions or video.

    Raises:
        TypeError, ValueError: as `reconstruction_target`; or the kind is unknown, or the shape of the prediction does
            not fit the video, the mask or the patch size.
    """
    return token_errors(
        prediction, video, masked_idx, kind, PatchFormat.of(patch_size, tubelet_size, normalize, mean, std)
    )


def token_errors(prediction: Tensor, video: Tensor, masked_idx: Tensor, kind: Kind, patches: PatchFormat) -> Tensor:
    """`reconstruction_error` of a given format."""
    check_kind(kind)
    check_floating("prediction", prediction)
    num_tokens = check_target(video, patches)
    check_device("prediction", prediction, video.device)
    check_index_shape("masked_idx", masked_idx, video.shape[0], video.device, several=True)
    expected = (*masked_idx.shape, patches.pixels * video.shape[1])
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected {expected}: clips, masked tokens, and "
            f"{'x'.join(map(str, patches.patch))} pixels of {video.shape[1]} channels. Check patch_size and "
            "tubelet_size. If the decoder predicts all tokens, take the masked ones first. If it predicts some of the "
            "masked tokens, use sample.target_idx."
        )
    check_indices("masked_idx", masked_idx, video.shape[0], num_tokens, video.device, several=True)
    kernel = backend_for(prediction, video, obstacle=error_obstacle(video, patches)) == "triton"
    wants = torch.is_grad_enabled() and prediction.requires_grad
    error: Tensor = _ReconstructionError.apply(prediction, video.detach(), masked_idx, kind, patches, kernel, wants)
    return error
