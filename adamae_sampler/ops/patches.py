"""Converts video to patches and back, in the layout of the reconstruction target."""

from __future__ import annotations

import einops._torch_specific  # noqa: F401  registers einops with torch.compile, as torch 2.7 needs
from einops import rearrange
from torch import Tensor

from adamae_sampler.ops.patch_format import PatchFormat, PatchSize


def patchify(video: Tensor, patch_size: PatchSize = 16, tubelet_size: int = 2) -> Tensor:
    """[B, C, T, H, W] -> [B, N, P]: tokens in t-h-w order, values of a patch laid out (t p1 p2 c).

    Raises:
        ValueError: the video is not [B, C, T, H, W], or patches do not divide it.
    """
    return cut_patches(video, PatchFormat.of(patch_size, tubelet_size))


def cut_patches(video: Tensor, patches: PatchFormat) -> Tensor:
    """`patchify` of a given format."""
    patches.grid(video.shape)
    pt, p1, p2 = patches.patch
    return rearrange(video, "b c (t pt) (h p1) (w p2) -> b (t h w) (pt p1 p2 c)", pt=pt, p1=p1, p2=p2)


def unpatchify(
    patches: Tensor, grid_size: tuple[int, int, int], patch_size: PatchSize = 16, tubelet_size: int = 2
) -> Tensor:
    """[B, N, P] -> [B, C, T, H, W], the inverse of `patchify`.

    Raises:
        ValueError: N is not the size of the grid, or P is not a multiple of the pixels of a patch.
    """
    return join_patches(patches, grid_size, PatchFormat.of(patch_size, tubelet_size))


def join_patches(values: Tensor, grid_size: tuple[int, int, int], patches: PatchFormat) -> Tensor:
    """`unpatchify` of a given format."""
    (t, h, w), (pt, p1, p2) = grid_size, patches.patch
    if values.ndim != 3 or values.shape[1] != t * h * w or values.shape[2] % patches.pixels:
        raise ValueError(
            f"patches have shape {tuple(values.shape)}, expected [B, {t * h * w}, P] for the grid {grid_size}, with P "
            f"a multiple of {patches.pixels}, the pixels of a {pt}x{p1}x{p2} patch."
        )
    pattern = "b (t h w) (pt p1 p2 c) -> b c (t pt) (h p1) (w p2)"
    return rearrange(values, pattern, t=t, h=h, w=w, pt=pt, p1=p1, p2=p2)
