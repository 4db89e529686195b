"""The parts of the reference model that timm does not have: video patch embedding, 1-d sinusoid table, blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from adamae_sampler.ops.patches import PatchSize, patch_pair

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed3d(nn.Module):
    """Tubelets to tokens: a 3-d convolution whose stride is its kernel (Table 5, "Tokenization").

    Args:
        patch_size: height and width of a patch in pixels.
        tubelet_size: frames of a patch.
        in_chans: channels of the video.
        embed_dim: D, width of the tokens.
    """

    def __init__(self, patch_size: PatchSize, tubelet_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        kernel = (tubelet_size, *patch_pair(patch_size))
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def of_patches(self, patches: Tensor) -> Tensor:
        """Patches [..., P], laid out (t p1 p2 c) -> tokens [..., D], those that `forward` makes of them."""
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # [D, P]
        return F.linear(patches, weight, self.proj.bias)

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, N, D], tokens in t-h-w order."""
        x = self.proj(video)  # [B, D, T', H', W']
        return x.flatten(2).transpose(1, 2).contiguous()  # rows in memory, for the gathers that follow


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """[1, N, D] fixed position embedding: sin and cos of n / 10000^(2 floor(d/2) / D), over the flat token index."""
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    even = torch.arange(width, dtype=torch.float64) // 2 * 2
    angle = position / 10000.0 ** (even / width)  # [N, D]
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]


class Transformer(nn.ModuleList):
    """Pre-norm blocks on timm's EvaBlock: fused attention whose q and v have biases and k has none.

    Args:
        depth: number of blocks.
        width: D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        block: more arguments of EvaBlock.
    """

    def __init__(
        self, depth: int, width: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, **block: Any
    ) -> None:
        if width % num_heads:
            raise ValueError(
                f"{num_heads} heads do not divide the width {width}; choose num_heads and embed_dim (of the "
                "decoder decoder_num_heads and decoder_embed_dim) to fit."
            )
        super().__init__(
            EvaBlock(
                width,
                num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=LayerNorm,
                drop_path=drop_path * index / max(depth - 1, 1),
                **block,
            )
            for index in range(depth)
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            checkpointed: Tensor = checkpoint_seq(self, x, use_reentrant=False)
            return checkpointed
        for block in self:
            x = block(x)
        return x
