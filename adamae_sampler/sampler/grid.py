"""Shows tokens of a regular lattice."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.draw import uniform_noise
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.draws import draw_classes


class GridTokenSampler(TokenSampler):
    """Shows K tokens of a regular lattice with a random offset, as MAE's grid-wise sampling. K = floor(N (1 - ratio)).

    He et al., "Masked Autoencoders Are Scalable Vision Learners", Figure 6, keep one of each 2 x 2 patches. Here a
    lattice keeps one token of each cell (t, h, w), in video and for any ratio. Of the lattice, K tokens are drawn
    uniformly. The cell is the one with the smallest lattice that has K tokens at every offset. Of several, it is the
    most cubic. With a ratio of 0.75 on (1, 14, 14) it is (1, 2, 2), and the lattice has K tokens. If no cell of several
    tokens leaves K, the cell is one token, and the masks are random ones.

    Args:
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask.
        num_masks: R, masks of each clip, see `TokenSampler`; each has an offset of its own.

    Attributes:
        cell: (t, h, w), the distance of the lattice's tokens in the sampler's own grid.
    """

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.75, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)
        self.cell = lattice_cell(self.grid_size, self.num_visible)

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws an offset for each mask, then K tokens of its lattice."""
        num_visible, grid_size = self.num_drawn(grid_size), grid_size or self.grid_size
        cells = self.cell if grid_size == self.grid_size else lattice_cell(grid_size, num_visible)
        rows, device = tokens.shape[0] * self.num_masks, tokens.device
        uniform = uniform_noise((rows, 3), device, generator)
        on_lattice = torch.ones(rows, 1, 1, 1, dtype=torch.bool, device=device)  # grows to [rows, T, H, W]
        for axis, (side, cell) in enumerate(zip(grid_size, cells, strict=True)):
            offset = (uniform[:, axis, None] * cell).long()  # [rows, 1]
            along = torch.arange(side, device=device) % cell == offset  # [rows, side]
            on_lattice = on_lattice & along.view(rows, *(side if each == axis else 1 for each in range(3)))
        return draw_classes(on_lattice.flatten(1).float(), num_visible, generator, valid)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{super().extra_repr()}, cell={self.cell}"


@torch.compiler.assume_constant_result
def lattice_cell(grid_size: GridSize, num_visible: int) -> GridSize:
    """The cell of the smallest lattice that has `num_visible` tokens at every offset.

    The size of a lattice is that at its worst offset. Of several the cell is the most cubic, and of these the largest.
    """
    return _best_cell(grid_size, num_visible)


@functools.cache
def _best_cell(grid_size: GridSize, num_visible: int) -> GridSize:
    cells = itertools.product(*(range(1, side + 1) for side in grid_size))
    smallest = {  # tokens of a lattice at the worst offset, by cell
        (t, h, w): math.prod(side // length for side, length in zip(grid_size, (t, h, w), strict=True))
        for t, h, w in cells
    }
    enough = [cell for cell, count in smallest.items() if count >= num_visible]
    return min(enough, key=lambda cell: (smallest[cell], max(cell) - min(cell), -math.prod(cell), cell))
