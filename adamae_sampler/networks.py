"""Score networks: modules from tokens [B, N, D] to one score for each token [B, N] (supplement, section F)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class MHAScoreNetwork(nn.Module):
    """Pre-norm transformer blocks over all tokens, then one linear layer to a score (Figure 1b).

    The defaults are those of the official code: one block of the tokens' full width with 8 heads, qkv without
    bias, dropout 0.1 on what each branch returns, and a learned position embedding of its own.

    Args:
        embed_dim: D, width of the tokens.
        num_tokens: N, tokens of a clip.
        depth: number of blocks.
        num_heads: attention heads; they must divide the width.
        width: width of the blocks, D if None. A narrower network projects the tokens first.
        mlp_ratio: hidden width of a block's MLP over its width.
        drop: dropout rate.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int,
        depth: int = 1,
        num_heads: int = 8,
        width: int | None = None,
        mlp_ratio: float = 4.0,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        width = width or embed_dim
        if width % num_heads:
            raise ValueError(
                f"the score network's {num_heads} heads do not divide its width {width}. Choose num_heads or width to "
                "fit, as in AdaptiveTokenSampler(..., network=MHAScoreNetwork(embed_dim, num_tokens, num_heads=4))."
            )
        self.project = nn.Linear(embed_dim, width, bias=False) if width != embed_dim else nn.Identity()
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, proj_drop=drop, norm_layer=nn.LayerNorm, mlp_layer=_mlp)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 1)
        init_linear_layers(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N] fp32."""
        x = self.project(tokens) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return _score(self.head, x)


class MLPScoreNetwork(nn.Module):
    """Linear(D, D), then Linear(D, 1), for each token by itself (Figure 1a).

    The supplement names the two linear layers and no activation; two of them in a row are one linear map, so a
    GELU stands between. `act_layer=nn.Identity` gives the text to the letter.

    Args:
        embed_dim: D, width of the tokens.
        act_layer: activation between the layers.
    """

    def __init__(self, embed_dim: int, act_layer: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.hidden = nn.Linear(embed_dim, embed_dim)
        self.act = act_layer()
        self.head = nn.Linear(embed_dim, 1)
        init_linear_layers(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N] fp32."""
        return _score(self.head, self.act(self.hidden(tokens)))


def _mlp(*, drop: float, **kwargs: Any) -> Mlp:
    """VideoMAE's MLP, which drops after its second layer alone."""
    return Mlp(drop=(0.0, drop), **kwargs)


def _score(head: nn.Linear, x: Tensor) -> Tensor:
    """The last layer in fp32, also under autocast: half precision has too few digits for 1568 log-probabilities."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        return F.linear(x.float(), head.weight.float(), head.bias.float()).squeeze(-1)


def init_linear_layers(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as VideoMAE and AdaMAE initialise."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
