"""Video to patches and back, in the layout of the reconstruction target."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

PatchSize = int | tuple[int, int]


def token_grid(video_shape: tuple[int, ...], patch_size: PatchSize, tubelet_size: int) -> tuple[int, int, int]:
    """The (T, H, W) token grid of a [B, C, T, H, W] video.

    Raises:
        ValueError: the video is not [B, C, T, H, W], or its frames or sides are not divisible.
    """
    if len(video_shape) != 5:
        raise ValueError(
            f"video has shape {tuple(video_shape)}, expected [B, C, T, H, W]: clips, channels, frames, height, width. "
            "For images use images.unsqueeze(2) and tubelet_size=1."
        )
    frames, height, width = video_shape[2:]
    patch_height, patch_width = patch_pair(patch_size)
    for each in (tubelet_size, patch_height, patch_width):
        if not isinstance(each, int) or each < 1:
            raise ValueError(
                f"tubelet_size={tubelet_size} and patch_size={patch_size}, expected positive whole numbers."
            )
    if frames % tubelet_size:
        raise ValueError(
            f"video has {frames} frames, which tubelet_size={tubelet_size} does not divide. "
            f"Take {frames - frames % tubelet_size or tubelet_size} frames or another tubelet size, 1 for images."
        )
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"video frames are {height}x{width}, which patches of {patch_height}x{patch_width} do not divide. "
            "Resize or crop the frames, or choose another patch size."
        )
    return frames // tubelet_size, height // patch_height, width // patch_width


def patch_pair(patch_size: PatchSize) -> tuple[int, int]:
    """patch_size as (height, width).

    Raises:
        ValueError: neither a number nor a pair.
    """
    if isinstance(patch_size, int):
        return patch_size, patch_size
    if not isinstance(patch_size, Sequence) or len(patch_size) != 2:
        raise ValueError(f"patch_size={patch_size}, expected a whole number, or a pair of them: height, width.")
    return patch_size[0], patch_size[1]


def patchify(video: Tensor, patch_size: PatchSize = 16, tubelet_size: int = 2) -> Tensor:
    """[B, C, T, H, W] -> [B, N, P]: tokens in t-h-w order, values of a patch laid out (t p1 p2 c).

    Raises:
        ValueError: the video is not [B, C, T, H, W] or not divisible into patches.
    """
    token_grid(tuple(video.shape), patch_size, tubelet_size)
    p1, p2 = patch_pair(patch_size)
    return rearrange(video, "b c (t pt) (h p1) (w p2) -> b (t h w) (pt p1 p2 c)", pt=tubelet_size, p1=p1, p2=p2)


def unpatchify(
    patches: Tensor, grid_size: tuple[int, int, int], patch_size: PatchSize = 16, tubelet_size: int = 2
) -> Tensor:
    """[B, N, P] -> [B, C, T, H, W], the inverse of `patchify`.

    Raises:
        ValueError: N is not the size of the grid, or P is not a multiple of the pixels of a patch.
    """
    t, h, w = grid_size
    p1, p2 = patch_pair(patch_size)
    pixels = tubelet_size * p1 * p2
    if patches.ndim != 3 or patches.shape[1] != t * h * w or patches.shape[2] % pixels:
        raise ValueError(
            f"patches have shape {tuple(patches.shape)}, expected [B, {t * h * w}, P] for the grid {grid_size}, with P "
            f"a multiple of {pixels}, the pixels of a {tubelet_size}x{p1}x{p2} patch."
        )
    return rearrange(
        patches,
        "b (t h w) (pt p1 p2 c) -> b c (t pt) (h p1) (w p2)",
        t=t,
        h=h,
        w=w,
        pt=tubelet_size,
        p1=p1,
        p2=p2,
    )
