"""Pre-norm transformer blocks for the encoder, the decoder and the score networks."""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamae_sampler.attention import Attention
from adamae_sampler.ops import add_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm that takes, keeps and returns the input's dtype, under autocast too; see `ops.add_norm`."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.of_sum(x, None)[1]

    def of_sum(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, and the norm of the sum. A branch of None adds nothing."""
        return add_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """A pre-norm block without its last residual sum. The norm after the block computes sum and norm in one pass.

    Args:
        width: D, width of the tokens.
        num_heads: attention heads; they must divide the width.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: whether q and v have biases.
        drop: dropout rate of the outputs of attention and MLP.
        drop_path: rate of stochastic depth.
        eps: eps of the norms.
        mlp_layer: class of the MLP, with the arguments of timm's `Mlp`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        mlp_layer: type[nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, proj_drop=drop, scale_norm=False)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = mlp_layer(
            width, int(width * mlp_ratio), drop=(0.0, drop)
        )  # VideoMAE drops after the second layer only
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, D] and the branch still to be added to x -> the same two."""
        x, normed = self.norm1.of_sum(x, branch)
        x, normed = self.norm2.of_sum(x, self.drop_path(self.attn(normed)))
        return x, self.drop_path(self.mlp(normed))


class Transformer(nn.ModuleList):
    """A stack of blocks.

    Args:
        depth: number of blocks.
        width: D, width of the tokens.
        num_heads: attention heads.
        mlp_ratio: see `Block`.
        qkv_bias: see `Block`.
        drop: see `Block`.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        eps: see `Block`.
        mlp_layer: see `Block`.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        mlp_layer: type[nn.Module] = Mlp,
    ) -> None:
        if width % num_heads:
            raise ValueError(
                f"{num_heads} heads do not divide the width {width}. Choose num_heads and embed_dim to fit, or for the "
                "decoder decoder_num_heads and decoder_embed_dim."
            )
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        super().__init__(Block(width, num_heads, mlp_ratio, qkv_bias, drop, rate, eps, mlp_layer) for rate in rates)
        self.grad_checkpointing = False

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        """One block, or some of them as a plain list."""
        blocks = list(self)[index]
        return nn.ModuleList(blocks) if isinstance(blocks, list) else blocks

    def forward(self, x: Tensor, norm: LayerNorm | None = None, last: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], normed if `norm` is given; only the `last` tokens, if that is given."""
        branch: Tensor | None = None
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch)
        if last is not None:
            x, branch = x[:, -last:], None if branch is None else branch[:, -last:]
        if norm is not None:
            return norm.of_sum(x, branch)[1]
        return x if branch is None else x + branch
