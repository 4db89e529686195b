"""Pre-norm transformer blocks, of the encoder, the decoder and the score networks."""

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
        """x + branch (x if it is None), and the norm of that."""
        return add_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """A pre-norm block that leaves its last sum to the norm that follows, which makes both in one pass.

    Args:
        width: D.
        num_heads: attention heads; they must divide the width.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: whether q and v have biases.
        drop: dropout of what attention and MLP return.
        drop_path: stochastic depth.
        eps: of the norms.
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
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, proj_drop=drop, scale_norm=False)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=(0.0, drop))  # VideoMAE's drops after its second layer alone
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, N, D], and what is still to be added to it -> the same two."""
        x, normed = self.norm1.of_sum(x, branch)
        x, normed = self.norm2.of_sum(x, self.drop_path(self.attn(normed)))
        return x, self.drop_path(self.mlp(normed))


class Transformer(nn.ModuleList):
    """A stack of blocks.

    Args:
        depth: number of blocks.
        width: D.
        num_heads: attention heads.
        mlp_ratio: see `Block`, as for `qkv_bias`, `drop` and `eps`.
        qkv_bias: see there.
        drop: see there.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        eps: see there.

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
    ) -> None:
        if width % num_heads:
            raise ValueError(
                f"{num_heads} heads do not divide the width {width}; choose num_heads and embed_dim (of the "
                "decoder decoder_num_heads and decoder_embed_dim) to fit."
            )
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        super().__init__(Block(width, num_heads, mlp_ratio, qkv_bias, drop, rate, eps) for rate in rates)
        self.grad_checkpointing = False

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        """One block, or some of them as a plain list."""
        blocks = list(self)[index]
        return nn.ModuleList(blocks) if isinstance(blocks, list) else blocks

    def forward(self, x: Tensor, norm: LayerNorm | None = None, last: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or the norm of it; of the `last` tokens alone, if that is given."""
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
