"""patch_tokens: the pixels of each token as a row, for a matrix product instead of a strided convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from adamae_sampler.ops.backend import KERNEL_DTYPES, backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import at_least_fp32, check_indices, check_video
from adamae_sampler.ops.gather import select_rows
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.registration import operator

_MOST_PIXELS = 8192  # pixels of a patch that one program holds; a larger patch takes the reference
_MOST_VALUES = 2**31 - 1  # values of a clip, which the kernels address in 32 bits
_MOST_CHANNELS = 4  # channels for which a kernel takes scale and shift

# ---------------------------------------------------------------------------------------------------- reference


def patch_rows(video: Tensor, idx: Tensor | None, patches: PatchFormat) -> Tensor:
    """The pixels of tokens as rows, in the memory order of the video.

    Args:
        video: [B, C, T, H, W].
        idx: [B R, M] int64; None means all tokens.
        patches: how the video is cut.

    Returns:
        [B, N, P] or [B R, M, P] in the video's dtype, values laid out (c t p1 p2).
    """
    pt, p1, p2 = patches.patch
    rows = rearrange(video, "b c (t pt) (h p1) (w p2) -> b (t h w) (c pt p1 p2)", pt=pt, p1=p1, p2=p2)
    return rows if idx is None else select_rows(rows, idx)


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def pixel_offsets(
    token,
    pixel,
    TOKENS_HW,
    TOKENS_W,
    stride_t,
    stride_h,
    stride_w,
    TUBELET: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
):
    """The memory offsets of a token's pixels, in the order (t p1 p2), within a channel of its clip."""
    t = token // TOKENS_HW * TUBELET + pixel // (P1 * P2)
    h = token % TOKENS_HW // TOKENS_W * P1 + pixel // P2 % P1
    w = token % TOKENS_W * P2 + pixel % P2
    return t * stride_t + h * stride_h + w * stride_w


@jit
def _patch_kernel(
    video_ptr,
    idx_ptr,
    out_ptr,
    N,
    M,
    R,
    TOKENS_HW,
    TOKENS_W,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    offset_of_values,
    ALL: tl.constexpr,
    C: tl.constexpr,
    TUBELET: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program copies one token's pixels, channel by channel; NaN if its index is out of range."""
    NUM_PIXELS: tl.constexpr = TUBELET * P1 * P2
    row = tl.program_id(0).to(tl.int64)
    if ALL:
        token = tl.program_id(0) % M
        exists = token < N
    else:
        index = tl.load(idx_ptr + row)
        exists = (index >= 0) & (index < N)
        token = index.to(tl.int32)
    pixel = tl.arange(0, PIXELS)
    inside = pixel < NUM_PIXELS
    offset = pixel_offsets(token, pixel, TOKENS_HW, TOKENS_W, stride_t, stride_h, stride_w, TUBELET, P1, P2)
    video_ptr += row // M // R * stride_b
    for c in tl.static_range(C):
        value = tl.load(video_ptr + c * stride_c + offset, mask=inside & exists, other=0)
        value = tl.where(exists, value.to(tl.float32) - offset_of_values, float("nan")).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * (C * NUM_PIXELS) + c * NUM_PIXELS + pixel, value, mask=inside)


# ----------------------------------------------------------------------------------------------------- operator


def patch_obstacle(video: Tensor, patches: PatchFormat) -> str:
    """The reason why the kernels cannot read the patches of this video; empty if they can."""
    if patches.pixels > _MOST_PIXELS:
        return f"the kernel takes patches of up to {_MOST_PIXELS} pixels, not {'x'.join(map(str, patches.patch))}"
    if (
        sum((size - 1) * stride for size, stride in zip(video.shape[1:], video.stride()[1:], strict=True))
        > _MOST_VALUES
    ):
        return f"the kernel takes clips of up to {_MOST_VALUES} values, not {tuple(video.shape[1:])}"
    return ""


def channel_obstacle(video: Tensor) -> str:
    """The reason why a kernel cannot take a mean and std for each channel; empty if it can."""
    if video.shape[1] > _MOST_CHANNELS:
        return f"the kernel takes the mean and std of up to {_MOST_CHANNELS} channels, not {video.shape[1]}"
    return ""


def channel_arguments(values: Sequence[float]) -> list[float | None]:
    """The values of the first four channels, padded with None, since a kernel has a fixed number of arguments."""
    return [*values, *[None] * _MOST_CHANNELS][:_MOST_CHANNELS]


def _empty_patches(
    video: Tensor, idx: Tensor | None, patch: Sequence[int], dtype: torch.dtype, offset: float
) -> Tensor:
    pt, p1, p2 = patch
    rows = (video.shape[0], math.prod(PatchFormat((pt, p1, p2)).grid(video.shape))) if idx is None else idx.shape
    return video.new_empty(*rows, video.shape[1] * math.prod(patch), dtype=dtype)


@operator(
    "patch_tokens(Tensor video, Tensor? idx, int[] patch, ScalarType dtype, float offset) -> Tensor", _empty_patches
)
def _patch_op(video: Tensor, idx: Tensor | None, patch: Sequence[int], dtype: torch.dtype, offset: float) -> Tensor:
    out = _empty_patches(video, idx, patch, dtype, offset)
    (draws, places), (batch, channels) = out.shape[:2], video.shape[:2]
    pt, p1, p2 = patch
    grid_t, grid_h, grid_w = PatchFormat((pt, p1, p2)).grid(video.shape)
    pixels = next_power_of_2(pt * p1 * p2)
    launch(
        _patch_kernel,
        draws * places,
        video,
        None if idx is None else idx.contiguous(),
        out,
        grid_t * grid_h * grid_w,
        places,
        draws // max(batch, 1),
        grid_h * grid_w,
        grid_w,
        *video.stride(),
        offset,
        ALL=idx is None,
        C=channels,
        TUBELET=pt,
        P1=p1,
        P2=p2,
        PIXELS=pixels,
        num_warps=max(1, min(pixels // 512, 8)),
    )
    return out


# ------------------------------------------------------------------------------------------------------- public


def patch_tokens(
    video: Tensor,
    idx: Tensor | None = None,
    *,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    dtype: torch.dtype | None = None,
    offset: float = 0.0,
) -> Tensor:
    """The pixels of tokens as rows, in the order of a `Conv3d` kernel: `F.linear(rows, conv.weight.flatten(1))` embeds.

    Values are not scaled: uint8 pixels stay 0 to 255, which half precision holds exactly. Put a mean and a standard
    deviation into the weights, as `adamae_sampler.models.layers.PatchEmbed3d` does.

    Args:
        video: [B, C, T, H, W], uint8 or floating point. A video that requires a gradient takes the reference, which
            has one.
        idx: [B, M] int64, or [B R, M] for R masks of each clip, the tokens to take; None takes all N.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        dtype: dtype of the result; None means the video's if it is floating point, else fp32.
        offset: number to subtract from every value. Pixels minus 128 are as exact, and their sums keep more digits.

    Returns:
        [B, N, P] or [B R, M, P], P = C * tubelet_size * p1 * p2, laid out (c t p1 p2); tokens in t-h-w order.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a size that patches do not divide, an index out of range (checked
            on CPU in eager mode only; the kernel gives NaN for it).

    >>> import torch
    >>> patch_tokens(torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 2, 4), patch_size=2, tubelet_size=1).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    return rows_of_patches(video, idx, PatchFormat.of(patch_size, tubelet_size), dtype=dtype, offset=offset)


def rows_of_patches(
    video: Tensor, idx: Tensor | None, patches: PatchFormat, *, dtype: torch.dtype | None = None, offset: float = 0.0
) -> Tensor:
    """`patch_tokens` of a given format."""
    num_tokens = check_video(video, patches)
    if idx is not None:
        check_indices("idx", idx, video.shape[0], num_tokens, video.device, several=True)
    dtype = dtype or (video.dtype if video.is_floating_point() else torch.float32)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}, expected a floating-point dtype.")
    needs_grad = video.requires_grad and torch.is_grad_enabled()
    obstacle = "the kernel has no gradient for the video" if needs_grad else patch_obstacle(video, patches)
    if dtype not in KERNEL_DTYPES:
        obstacle = f"the kernel gives float32, float16 and bfloat16, not {dtype}"
    if backend_for(video, obstacle=obstacle) == "triton":
        rows: Tensor = _patch_op(video, idx, patches.patch, dtype, float(offset))
        return rows
    found = patch_rows(video, idx, patches)
    return (at_least_fp32(found) - offset).to(dtype) if offset else found.to(dtype)
