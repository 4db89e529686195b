"""The encoder that pre-training and classification share, and the size of its clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from adamae_sampler.models.layers import PatchEmbed3d, sinusoid_table
from adamae_sampler.ops import gather_tokens
from adamae_sampler.ops.gather import select_rows
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.positions import GridSize, resample
from adamae_sampler.transformer import LayerNorm, Transformer


@dataclass(frozen=True)
class VideoSize:
    """The clips that a model takes, and how they are cut into tokens.

    Attributes:
        video: (C, T, H, W) of a clip.
        patches: how a clip is cut into patches, and the mean and std by which uint8 video is normalised.
        grid: (T, H, W) tokens.
    """

    video: tuple[int, int, int, int]
    patches: PatchFormat
    grid: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        img_size: int | tuple[int, int],
        num_frames: int,
        patch_size: PatchSize,
        tubelet_size: int,
        in_chans: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> VideoSize:
        """Builds the size from a model's arguments. Without mean and std, three channels get ImageNet's.

        Raises:
            TypeError, ValueError: see `PatchFormat.of` and `PatchFormat.grid`.
        """
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if mean is None and std is None and in_chans == len(IMAGENET_DEFAULT_MEAN):
            mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        video, patches = (
            (in_chans, num_frames, height, width),
            PatchFormat.of(patch_size, tubelet_size, False, mean, std),
        )
        return cls(video, patches, patches.grid((1, *video)))

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return self.patches.patch[1:]

    @property
    def tubelet(self) -> int:
        """Frames of a patch."""
        return self.patches.patch[0]

    @property
    def num_tokens(self) -> int:
        """N, tokens of a clip."""
        return math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        """P, values of a patch."""
        return self.patches.pixels * self.video[0]

    def grid_of(self, video: Tensor, dynamic: bool = False) -> GridSize:
        """The grid (T, H, W) of a video's tokens.

        Args:
            video: [B, C, T, H, W].
            dynamic: whether clips of other sizes are taken, if patches divide them.

        Raises:
            TypeError: the video has integers other than uint8.
            ValueError: the shape is not [B, *self.video]; with `dynamic`, other channels, or a size that patches do not
                divide.
        """
        if dynamic:
            self._check_dtype(video)
            if video.ndim != 5 or video.shape[1] != self.video[0]:
                raise ValueError(
                    f"video has shape {tuple(video.shape)}, expected [B, {self.video[0]}, T, H, W] (clips, channels, "
                    "frames, height, width)."
                )
            return self.patches.grid(video.shape)
        self.check(video)
        return self.grid

    def _check_dtype(self, video: Tensor) -> None:
        if not video.is_floating_point() and video.dtype != torch.uint8:
            raise TypeError(f"video has dtype {video.dtype}, expected uint8 pixels or normalised floating point.")

    def check(self, video: Tensor) -> None:
        """Raises TypeError for integers other than uint8, and ValueError unless the shape is [B, *self.video]."""
        self._check_dtype(video)
        if tuple(video.shape[1:]) != self.video:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, expected [B, {', '.join(map(str, self.video))}] (clips, "
                "channels, frames, height, width). Build the model with img_size, num_frames and in_chans to fit, or "
                "AdaMAE with dynamic_img_size=True to take other sizes too."
            )


class Encoder(nn.Module):
    """Patch embedding, and a transformer over the visible tokens or over all.

    Args:
        size: the clips, and how they are cut and normalised.
        width: D, width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        norm: whether a LayerNorm follows the last block.
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
    ) -> None:
        super().__init__()
        self.grid_size = size.grid
        self.patch_embed = PatchEmbed3d(size.patches, size.video[0], width)
        self.register_buffer("pos_embed", sinusoid_table(size.num_tokens, width), persistent=False)
        self.blocks = Transformer(depth, width, num_heads, drop_path=drop_path)
        self.norm = LayerNorm(width) if norm else None

    def forward(self, tokens: Tensor, visible_idx: Tensor | None = None, grid_size: GridSize | None = None) -> Tensor:
        """Encodes all tokens, or the visible ones.

        Args:
            tokens: [B, N, D], without position embedding.
            visible_idx: [B, K], the tokens to encode; None for all.
            grid_size: (T, H, W) of the tokens, if it is not the encoder's own; positions are resampled.

        Returns:
            [B, N, D]; or [B, K, D].
        """
        positions = self.positions(grid_size)
        if visible_idx is None:
            x = tokens + positions.to(tokens.dtype)
        else:
            x = gather_tokens(tokens, visible_idx, positions)
        encoded: Tensor = self.blocks(x, self.norm)
        return encoded

    def of_visible(self, visible: Tensor, visible_idx: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """Visible tokens [B, K, D] without position embedding, and visible_idx [B, K] -> encoded [B, K, D]."""
        x = visible + select_rows(self.positions(grid_size).to(visible.dtype), visible_idx)
        encoded: Tensor = self.blocks(x, self.norm)
        return encoded

    def positions(self, grid_size: GridSize | None = None) -> Tensor:
        """The position embedding [1, N, D] at a grid; None for the encoder's own."""
        return resample(self.pos_embed, self.grid_size, grid_size or self.grid_size)


@torch.no_grad()
def fill_constants(model: nn.Module) -> None:
    """Fills the encoder's position table and the key biases, which checkpoints lack (see timm's
    init_non_persistent_buffers)."""
    for module in model.modules():
        if isinstance(module, Encoder):
            module.pos_embed.copy_(sinusoid_table(*module.pos_embed.shape[1:]))
        if isinstance(module, EvaAttention) and module.k_bias is not None:
            module.k_bias.zero_()
