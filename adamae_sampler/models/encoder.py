"""The encoder that pre-training and classification share, and the size of the clips it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from adamae_sampler.models.layers import PatchEmbed3d, sinusoid_table
from adamae_sampler.ops import gather_tokens
from adamae_sampler.ops.gather import select_rows
from adamae_sampler.ops.patches import PatchSize, patch_pair, token_grid
from adamae_sampler.transformer import LayerNorm, Transformer


@dataclass(frozen=True)
class VideoSize:
    """The clips a model takes, and how they are cut into tokens.

    Attributes:
        video: (C, T, H, W) of a clip.
        patch: height and width of a patch in pixels.
        tubelet: frames of a patch.
        grid: (T, H, W) tokens.
        num_tokens: N.
        patch_values: P.
    """

    video: tuple[int, int, int, int]
    patch: tuple[int, int]
    tubelet: int
    grid: tuple[int, int, int]
    num_tokens: int
    patch_values: int

    @classmethod
    def of(
        cls, img_size: int | tuple[int, int], num_frames: int, patch_size: PatchSize, tubelet_size: int, in_chans: int
    ) -> VideoSize:
        """From a model's arguments; raises ValueError for sizes that do not divide."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        video, patch = (in_chans, num_frames, height, width), patch_pair(patch_size)
        grid = token_grid((1, *video), patch, tubelet_size)
        return cls(
            video, patch, tubelet_size, grid, grid[0] * grid[1] * grid[2], tubelet_size * patch[0] * patch[1] * in_chans
        )

    def check(self, video: Tensor) -> None:
        """Raises TypeError for other integers than uint8, ValueError for another shape than [B, C, T, H, W] of this
        size."""
        if not video.is_floating_point() and video.dtype != torch.uint8:
            raise TypeError(f"video has dtype {video.dtype}, expected uint8 pixels, or floating point, normalised.")
        if tuple(video.shape[1:]) != self.video:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, expected [B, {', '.join(map(str, self.video))}] (clips, "
                "channels, frames, height, width). Build the model with img_size, num_frames and in_chans to fit."
            )


class Encoder(nn.Module):
    """Patch embedding and transformer over the tokens it is given.

    Args:
        size: of the clips.
        width: D.
        depth: number of blocks.
        num_heads: attention heads.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        norm: whether a LayerNorm ends it.
        mean: what uint8 video is normalised by, see `PatchEmbed3d`; None is ImageNet's for three channels, else none.
        std: the standard deviations that go with `mean`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        size: VideoSize,
        width: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        norm: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        channels = size.video[0]
        if mean is None and std is None and channels == len(IMAGENET_DEFAULT_MEAN):
            mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        self.patch_embed = PatchEmbed3d(size.patch, size.tubelet, channels, width, mean, std)
        self.register_buffer("pos_embed", sinusoid_table(size.num_tokens, width), persistent=False)
        self.blocks = Transformer(depth, width, num_heads, drop_path=drop_path)
        self.norm = LayerNorm(width) if norm else None

    def forward(self, tokens: Tensor, visible_idx: Tensor | None = None) -> Tensor:
        """All tokens [B, N, D] -> the encoded visible ones [B, K, D] (visible_idx [B, K]), or all [B, N, D]."""
        if visible_idx is None:
            x = tokens + self.pos_embed.to(tokens.dtype)
        else:
            x = gather_tokens(tokens, visible_idx, self.pos_embed)
        encoded: Tensor = self.blocks(x, self.norm)
        return encoded

    def of_visible(self, visible: Tensor, visible_idx: Tensor) -> Tensor:
        """The encoded visible tokens [B, K, D], of themselves."""
        x = visible + select_rows(self.pos_embed.to(visible.dtype), visible_idx)
        encoded: Tensor = self.blocks(x, self.norm)
        return encoded


@torch.no_grad()
def fill_constants(model: nn.Module) -> None:
    """Fills the encoder's position table and the key biases, which no checkpoint holds (see timm's
    init_non_persistent_buffers)."""
    for module in model.modules():
        if isinstance(module, Encoder):
            module.pos_embed.copy_(sinusoid_table(*module.pos_embed.shape[1:]))
        if isinstance(module, EvaAttention) and module.k_bias is not None:
            module.k_bias.zero_()
