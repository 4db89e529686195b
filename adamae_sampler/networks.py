"""Score networks: modules from tokens [B, N, D] to one score for each token [B, N] (supplement, section F)."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_sampler.ops import token_scores
from adamae_sampler.positions import GridSize, resample
from adamae_sampler.transformer import LayerNorm, Transformer

_MOST_CELLS = 200
Network = Literal["mha", "mlp", "mlp_linear", "pooled"]
_HEADS = {"mha": 8, "pooled": 3}  # of the networks that have blocks


class ScoreMlp(nn.Module):
    """The MLP of a score network's block. Its layers have names that no library of hosts rewrites.

    transformers renames every `mlp.fc1` and `mlp.fc2` of a ViTMAE in its files, also those of a submodule that it does
    not know.

    Args:
        width: D.
        hidden: hidden width.
        drop: dropout rates after the activation and after the second layer.
    """

    def __init__(self, width: int, hidden: int, drop: tuple[float, float]) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.drop1 = nn.Dropout(drop[0])
        self.shrink = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(drop[1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.drop1(F.gelu(self.expand(x)))
        return self.drop2(self.shrink(x))


class BlockScoreNetwork(nn.Module):
    """Base of the score networks with transformer blocks. Modifications:

    - weights of older files load, under the names that their layers had.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + current_name(name.removeprefix(prefix))] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def current_name(name: str) -> str:
    """The name of a score network's parameter, from its name in a file of any version."""
    for pattern, current in OLD_NAMES.items():
        name = re.sub(f"^{pattern}", current, name)
    return name


# Until 0.2 the layers were fc1 and fc2, which transformers 5 may have written as intermediate.dense and output.dense.
OLD_NAMES = {
    r"blocks\.(\d+)\.(?:mlp\.fc1|intermediate\.dense)\.": r"blocks.\1.mlp.expand.",
    r"blocks\.(\d+)\.(?:mlp\.fc2|output\.dense)\.": r"blocks.\1.mlp.shrink.",
}


class MHAScoreNetwork(BlockScoreNetwork):
    """Pre-norm transformer blocks over all tokens, then one linear layer to a score (Figure 1b).

    The defaults are those of the official code: one block of the tokens' full width with 8 heads, qkv without
    bias, dropout 0.1 on the output of each branch, and a learned position embedding of its own.

    Args:
        embed_dim: D, width of the tokens.
        num_tokens: N, tokens of a clip.
        depth: number of blocks.
        num_heads: attention heads; they must divide the width.
        width: width of the blocks, D if None. A narrower network projects the tokens first.
        mlp_ratio: hidden width of a block's MLP over its width.
        drop: dropout rate.
        grid_size: (T, H, W) of the N tokens, to score tokens of other grids. A sampler gives its own.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int,
        depth: int = 1,
        num_heads: int = _HEADS["mha"],
        width: int | None = None,
        mlp_ratio: float = 4.0,
        drop: float = 0.1,
        grid_size: GridSize | None = None,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        width = width or embed_dim
        if width % num_heads:
            raise ValueError(
                f"the score network's {num_heads} heads do not divide its width {width}. Choose num_heads or width to "
                "fit, as in AdaptiveTokenSampler(..., network=MHAScoreNetwork(embed_dim, num_tokens, num_heads=4))."
            )
        self.project = nn.Linear(embed_dim, width, bias=False) if width != embed_dim else nn.Identity()
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.blocks = Transformer(
            depth, width, num_heads, mlp_ratio, qkv_bias=False, drop=drop, eps=1e-5, mlp_layer=ScoreMlp
        )
        self.head = nn.Linear(width, 1)
        init_linear_layers(self)

    def forward(self, tokens: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """[B, N, D] -> [B, N] fp32. At another grid the position embedding is resampled."""
        positions: Tensor = self.pos_embed
        if grid_size is not None:
            if self.grid_size is None:
                raise ValueError(
                    f"tokens of the grid {grid_size}, and the network does not know the grid of its own "
                    f"{positions.shape[1]} tokens. Give MHAScoreNetwork grid_size=(T, H, W)."
                )
            positions = resample(positions, self.grid_size, grid_size)
        x = self.project(tokens)
        x = x + positions.to(x.dtype)  # an fp32 embedding would make the sum fp32 under autocast
        return _score(self.head, self.blocks(x))


class PooledScoreNetwork(BlockScoreNetwork):
    """Attention over cells of the grid instead of tokens. In ViT-B it costs a few percent of `MHAScoreNetwork`.

    Tokens are projected to a narrower width and averaged over each cell. The blocks run on the cells. Their output is
    added to each token's own projection, so tokens of one cell still differ. The paper does not have this network.

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W) tokens. Any size works, since the last cells of an axis may be smaller. At another grid the
            cells keep their size, and the embedding of their positions is resampled.
        pool: tokens of a cell in time, height and width. None means (2, 2, 2), doubled along the axis with the most
            cells until there are 200 cells or fewer. The cost then grows with the tokens, not with their square.
        width: width of the blocks, independent of D; choose less for a narrow model.
        depth: number of blocks.
        num_heads: attention heads; they must divide the width.
        mlp_ratio: hidden width of a block's MLP over its width.
        drop: dropout rate.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: GridSize,
        pool: GridSize | None = None,
        width: int = 192,
        depth: int = 1,
        num_heads: int = _HEADS["pooled"],
        mlp_ratio: float = 4.0,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{num_heads} heads do not divide the score network's width {width}. Change one to fit.")
        self.grid_size = grid_size
        t, h, w = (min(cell, side) for cell, side in zip(pool or _default_pool(grid_size), grid_size, strict=True))
        self.pool = (t, h, w)  # no cell is longer than the grid
        self.cells = _cells(grid_size, self.pool)
        self.project = nn.Linear(embed_dim, width, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.cells), width))
        self.blocks = Transformer(
            depth, width, num_heads, mlp_ratio, qkv_bias=False, drop=drop, eps=1e-5, mlp_layer=ScoreMlp
        )
        self.norm = LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, 1)
        init_linear_layers(self)
        start_even(self)

    def forward(self, tokens: Tensor, grid_size: GridSize | None = None) -> Tensor:
        """[B, N, D] -> [B, N] fp32. At another grid the cells keep their size."""
        grid_size = grid_size or self.grid_size
        if tokens.shape[1] != math.prod(grid_size):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected {math.prod(grid_size)} tokens, for the grid "
                f"{grid_size}. Build the network with the sampler's grid_size, or call it with that of these tokens."
            )
        cells = _cells(grid_size, self.pool)
        own = self.project(tokens)  # [B, N, width]
        positions = resample(self.pos_embed, self.cells, cells)
        x = self._pool(own, grid_size) + positions.to(own.dtype)  # [B, cells, width]
        _, normed = self.norm.of_sum(own, self._expand(self.blocks(x), grid_size, cells))
        return _score(self.head, F.gelu(normed))

    def _pool(self, x: Tensor, grid_size: GridSize) -> Tensor:
        """[B, N, width] -> [B, cells, width], the mean of each cell's tokens."""
        # Axis by axis, since avg_pool3d wants the width first and has no deterministic gradient on a GPU.
        grid = x.unflatten(1, grid_size)  # [B, T, H, W, width]
        for axis, (cell, side) in enumerate(zip(self.pool, grid_size, strict=True), start=1):
            whole = side - side % cell
            means = [grid.narrow(axis, 0, whole).unflatten(axis, (-1, cell)).mean(axis + 1)] if whole else []
            rest = [grid.narrow(axis, whole, side - whole).mean(axis, keepdim=True)] if whole < side else []
            grid = torch.cat([*means, *rest], axis)
        return grid.flatten(1, 3)

    def _expand(self, x: Tensor, grid_size: GridSize, cells: GridSize) -> Tensor:
        """[B, cells, width] -> [B, N, width]: each token gets the values of its cell."""
        grid = x.unflatten(1, cells)  # [B, cells in T, H, W, width]
        for axis, (cell, side) in enumerate(zip(self.pool, grid_size, strict=True), start=1):
            grid = grid.repeat_interleave(cell, axis).narrow(axis, 0, side)
        return grid.flatten(1, 3)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"grid_size={self.grid_size}, pool={self.pool}"


def _cells(grid_size: GridSize, pool: GridSize) -> GridSize:
    """The number of cells along each axis."""
    t, h, w = (-(-side // cell) for side, cell in zip(grid_size, pool, strict=True))
    return t, h, w


def _default_pool(grid_size: GridSize) -> GridSize:
    pool = [min(2, side) for side in grid_size]
    while math.prod(cells := _cells(grid_size, (pool[0], pool[1], pool[2]))) > _MOST_CELLS:
        pool[cells.index(max(cells))] *= 2
    return pool[0], pool[1], pool[2]


class MLPScoreNetwork(nn.Module):
    """Linear(D, D), then Linear(D, 1), for each token by itself (Figure 1a).

    The supplement draws the two linear layers and no activation. Without one they are a single linear map, so a GELU
    stands between them; `act_layer=nn.Identity` leaves it out.

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


def make_network(
    name: Network,
    embed_dim: int,
    grid_size: GridSize,
    score_depth: int | None = None,
    score_width: int | None = None,
) -> nn.Module:
    """The score network with this name.

    Args:
        name: "mha", the paper's; "mlp", its smaller one with a GELU between the layers; "mlp_linear", without, as the
            paper draws it; "pooled", which the paper does not have.
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W) tokens.
        score_depth: blocks of "mha" and "pooled"; None for 1.
        score_width: width of these blocks; None for D, or 192 for "pooled".

    Raises:
        ValueError: an unknown name, a width that is no multiple of the heads (8; 3 for "pooled"), or a depth or width
            for a network without blocks.
    """
    for setting, value in (("score_depth", score_depth), ("score_width", score_width)):
        if value is None:
            continue
        if name in ("mlp", "mlp_linear"):
            raise ValueError(
                f"{setting}={value}: the score network {name!r} has no blocks; leave it out, or take 'mha' or 'pooled'."
            )
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{setting}={value}, expected a whole number, 1 or more.")
    if score_width is not None and score_width % (heads := _HEADS.get(name, 1)):
        low = score_width // heads * heads
        near = f"{low} or {low + heads}" if low else f"{heads}"
        raise ValueError(
            f"score_width={score_width}, expected a multiple of the {heads} heads of the score network {name!r}, such "
            f"as {near}."
        )
    given = (("depth", score_depth), ("width", score_width))
    sizes: dict[str, Any] = {key: value for key, value in given if value is not None}
    if name == "mha":
        return MHAScoreNetwork(embed_dim, math.prod(grid_size), grid_size=grid_size, **sizes)
    if name == "pooled":
        return PooledScoreNetwork(embed_dim, grid_size, **sizes)
    if name not in ("mlp", "mlp_linear"):
        raise ValueError(
            f"score network {name!r}, expected 'mha', 'mlp', 'mlp_linear', 'pooled' or a module [B, N, D] -> [B, N]."
        )
    return MLPScoreNetwork(embed_dim, nn.GELU if name == "mlp" else nn.Identity)


def network_name(network: nn.Module) -> Network | None:
    """The name by which `make_network` makes such a network, of whatever sizes; None for others."""
    if isinstance(network, MHAScoreNetwork):
        return "mha"
    if isinstance(network, PooledScoreNetwork):
        return "pooled"
    if isinstance(network, MLPScoreNetwork):
        names: dict[type[nn.Module], Network] = {nn.GELU: "mlp", nn.Identity: "mlp_linear"}
        return names.get(type(network.act))
    return None


def _score(head: nn.Linear, x: Tensor) -> Tensor:
    return token_scores(x, head.weight.flatten(), head.bias)


def start_even(network: Any) -> None:
    """Zeroes the last layer of a score network, so that all scores are equal and the masks are random ones."""
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)


def init_linear_layers(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as VideoMAE and AdaMAE initialise."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
