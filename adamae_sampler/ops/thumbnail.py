"""thumbnails: every patch shrunk to a few pixels, directly from the video, for a sampler that sees pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adamae_sampler.ops.backend import KERNEL_DTYPES, backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import at_least_fp32, check_channels, check_video
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.patches import cut_patches
from adamae_sampler.ops.pixel_rows import channel_arguments, channel_obstacle, patch_obstacle, pixel_offsets
from adamae_sampler.ops.registration import operator

_SIDE = 4  # pixels of a shrunk patch's side


def shrunk(patches: PatchFormat) -> PatchFormat:
    """The format of the shrunk patches: as many frames; each side has gcd(4, side of the patch) pixels."""
    tubelet, p1, p2 = patches.patch
    return PatchFormat((tubelet, math.gcd(_SIDE, p1), math.gcd(_SIDE, p2)))


# ---------------------------------------------------------------------------------------------------- reference


def _thumbnails_reference(
    video: Tensor, patches: PatchFormat, scale: Sequence[float] | None, shift: Sequence[float] | None
) -> Tensor:
    (_, p1, p2), (_, side1, side2) = patches.patch, shrunk(patches).patch
    small = torch.nn.functional.avg_pool3d(at_least_fp32(video), (1, p1 // side1, p2 // side2))
    if scale is not None and shift is not None:
        channels = zip(small.unbind(1), scale, shift, strict=True)
        small = torch.stack([x * factor + offset for x, factor, offset in channels], dim=1)
    return cut_patches(small, shrunk(patches))


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _thumbnails_kernel(
    video_ptr,
    out_ptr,
    N,
    TOKENS_HW,
    TOKENS_W,
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
    SCALED: tl.constexpr,
    C: tl.constexpr,
    TUBELET: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    SIDE1: tl.constexpr,
    SIDE2: tl.constexpr,
    SMALL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One program shrinks one token's patch. A row of the tile holds all pixels that one result pixel averages."""
    POOL1: tl.constexpr = P1 // SIDE1
    POOL2: tl.constexpr = P2 // SIDE2
    row = tl.program_id(0).to(tl.int64)
    small = tl.arange(0, SMALL)
    within = tl.arange(0, WINDOW)[None, :]
    t, h, w = small // (SIDE1 * SIDE2), small // SIDE2 % SIDE1, small % SIDE2
    corner = (t * P1 + h * POOL1) * P2 + w * POOL2  # counted (t p1 p2)
    pixel = corner[:, None] + within // POOL2 * P2 + within % POOL2
    inside = small < TUBELET * SIDE1 * SIDE2
    read = inside[:, None] & (within < POOL1 * POOL2)
    token = tl.program_id(0) % N
    offset = pixel_offsets(token, pixel, TOKENS_HW, TOKENS_W, stride_t, stride_h, stride_w, TUBELET, P1, P2)
    video_ptr += row // N * stride_b
    for c in tl.static_range(C):
        value = tl.load(video_ptr + c * stride_c + offset, mask=read, other=0).to(tl.float32)
        value = tl.sum(value, 1) / (POOL1 * POOL2)
        if SCALED:
            scale = scale_0 if c == 0 else scale_1 if c == 1 else scale_2 if c == 2 else scale_3
            shift = shift_0 if c == 0 else shift_1 if c == 1 else shift_2 if c == 2 else shift_3
            value = value * scale + shift
        place = row * (C * TUBELET * SIDE1 * SIDE2) + small * C + c
        tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------- operator


def _empty_thumbnails(
    video: Tensor,
    patch: Sequence[int],
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    tubelet, p1, p2 = patch
    patches = PatchFormat((tubelet, p1, p2))
    values = video.shape[1] * shrunk(patches).pixels
    return video.new_empty(video.shape[0], math.prod(patches.grid(video.shape)), values, dtype=dtype)


@operator(
    "thumbnails(Tensor video, int[] patch, float[]? scale, float[]? shift, ScalarType dtype) -> Tensor",
    _empty_thumbnails,
)
def _thumbnails_op(
    video: Tensor,
    patch: Sequence[int],
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    out = _empty_thumbnails(video, patch, scale, shift, dtype)
    tubelet, p1, p2 = patch
    patches = PatchFormat((tubelet, p1, p2))
    _, side1, side2 = shrunk(patches).patch
    _, grid_h, grid_w = patches.grid(video.shape)
    launch(
        _thumbnails_kernel,
        out.shape[0] * out.shape[1],
        video,
        out,
        out.shape[1],
        grid_h * grid_w,
        grid_w,
        *video.stride(),
        *channel_arguments(scale or []),
        *channel_arguments(shift or []),
        SCALED=scale is not None,
        C=video.shape[1],
        TUBELET=tubelet,
        P1=p1,
        P2=p2,
        SIDE1=side1,
        SIDE2=side2,
        SMALL=next_power_of_2(tubelet * side1 * side2),
        WINDOW=next_power_of_2(p1 * p2 // (side1 * side2)),
        num_warps=1,
    )
    return out


# ------------------------------------------------------------------------------------------------------- public


def thumbnails(
    video: Tensor,
    *,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each patch averaged down to 4 x 4 pixels per frame, without a gradient.

    If 4 does not divide a side of the patch, that side gets gcd(4, side) pixels.

    Args:
        video: [B, C, T, H, W], uint8 or floating point.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means of uint8 pixels, as a share of 255, by which they are normalised. Floating-point values
            stay as they are.
        std: the standard deviations that go with `mean`.
        dtype: dtype of the result; None means the video's if it is floating point, else fp32.

    Returns:
        [B, N, C * tubelet_size * 4 * 4], laid out (t p1 p2 c); tokens in t-h-w order.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or a size that patches do not divide.
    """
    return shrink(video, PatchFormat.of(patch_size, tubelet_size, mean=mean, std=std), dtype)


@torch.no_grad()
def shrink(video: Tensor, patches: PatchFormat, dtype: torch.dtype | None = None) -> Tensor:
    """`thumbnails` of a given format."""
    check_video(video, patches)
    scale = shift = None
    if patches.mean is not None and patches.std is not None and video.dtype == torch.uint8:
        check_channels(video, patches)
        scale = [1 / (255 * each) for each in patches.std]
        shift = [-centre / each for centre, each in zip(patches.mean, patches.std, strict=True)]
    dtype = dtype or (video.dtype if video.is_floating_point() else torch.float32)
    obstacle = patch_obstacle(video, patches) or (channel_obstacle(video) if scale is not None else "")
    if dtype not in KERNEL_DTYPES:
        obstacle = f"the kernel gives float32, float16 and bfloat16, not {dtype}"
    if backend_for(video, obstacle=obstacle) == "triton":
        small: Tensor = _thumbnails_op(video, patches.patch, scale, shift, dtype)
        return small
    return _thumbnails_reference(video, patches, scale, shift).to(dtype)
