"""Hides space-time blocks."""

from __future__ import annotations

import functools
import math
import random

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.draw import uniform_noise
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.draws import draw_classes

_SIMULATIONS = 200
_MOST_BLOCKS = 1000
_ROUNDING = 1e-9  # above the floating-point error of a share of a side


class BlockTokenSampler(TokenSampler):
    """Hides space-time blocks of random place and aspect, as V-JEPA. K = floor(N (1 - ratio)) tokens stay visible.

    V-JEPA (Bardes et al., 2024; github.com/facebookresearch/jepa, src/masks) lays a fixed number of blocks of one size
    for a batch, and then cuts all clips of the batch to the fewest visible tokens. Here each block has its own aspect.
    Blocks are laid until M tokens are masked. Of the last block a random part is masked, so K is exact.

    Args:
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask.
        num_masks: R, masks of each clip, see `TokenSampler`.
        scale: share of a frame's H W positions that a block covers.
        aspect_ratio: the least and the largest height over width of a block, drawn uniformly between them.
        temporal_scale: share of the T time steps that a block lasts.

    Attributes:
        num_blocks: blocks that are laid for each mask of the sampler's own grid. They mask M tokens almost surely;
            where they do not, the rest is drawn uniformly from the tokens that no block covers.

    Raises:
        ValueError: a number is out of range, or the blocks are too small to mask M tokens.
    """

    def __init__(
        self,
        grid_size: GridSize,
        mask_ratio: float = 0.9,
        *,
        num_masks: int = 1,
        scale: float = 0.15,
        aspect_ratio: tuple[float, float] = (0.75, 1.5),
        temporal_scale: float = 1.0,
    ) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)
        for name, share in (("scale", scale), ("temporal_scale", temporal_scale)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share}, expected a share above 0, up to 1.")
        if len(aspect_ratio) != 2 or not 0 < aspect_ratio[0] <= aspect_ratio[1] < math.inf:
            raise ValueError(
                f"aspect_ratio={aspect_ratio}, expected the least and the largest height over width, such as "
                "(0.75, 1.5)."
            )
        self.scale = scale
        self.aspect_ratio = (aspect_ratio[0], aspect_ratio[1])
        self.temporal_scale = temporal_scale
        self.num_blocks = self._blocks_at(self.grid_size)

    def _size_at(self, grid_size: GridSize) -> tuple[int, int]:
        """Time steps of a block, and about how many positions of a frame it covers."""
        time, height, width = grid_size
        duration = max(1, int(time * self.temporal_scale + _ROUNDING))
        return duration, max(1, int(height * width * self.scale + _ROUNDING))

    def _blocks_at(self, grid_size: GridSize) -> int:
        """Blocks to lay in a grid."""
        masked = math.prod(grid_size) - self.num_visible_at(grid_size)
        blocks = enough_blocks(grid_size, masked, self._size_at(grid_size), self.aspect_ratio)
        if not blocks:
            raise ValueError(
                f"{_MOST_BLOCKS} blocks with scale={self.scale} and temporal_scale={self.temporal_scale} masked fewer "
                f"than {masked} of {math.prod(grid_size)} tokens, expected so many at mask_ratio={self.mask_ratio}. "
                "Give a larger scale or temporal_scale."
            )
        return blocks

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Numbers each token by the first block that covers it, and masks the M smallest numbers."""
        num_visible, grid_size = self.num_drawn(grid_size), grid_size or self.grid_size
        num_blocks = self.num_blocks if grid_size == self.grid_size else self._blocks_at(grid_size)
        duration, area = self._size_at(grid_size)
        rows, device = tokens.shape[0] * self.num_masks, tokens.device
        time, height, width = grid_size
        uniform = uniform_noise((4, rows, num_blocks), device, generator)
        aspect, *places = uniform.unbind()
        low, high = self.aspect_ratio
        aspect = low + (high - low) * aspect
        lengths = (
            torch.full_like(aspect, duration),
            (area * aspect).sqrt().round().clamp(1, height),
            (area / aspect).sqrt().round().clamp(1, width),
        )
        covered = torch.ones((), dtype=torch.bool, device=device)  # grows to [rows, blocks, T, H, W]
        for axis, (side, length, place) in enumerate(zip(grid_size, lengths, places, strict=True)):
            if axis == 0 and duration == time:
                continue  # blocks of all time steps are found in one
            start = (place * (side - length + 1)).floor()[..., None]  # [rows, blocks, 1]
            token = torch.arange(side, device=device)
            along = (start <= token) & (token < start + length[..., None])  # [rows, blocks, side]
            covered = covered & along.view(rows, num_blocks, *(side if each == axis else 1 for each in range(3)))
        block = torch.arange(num_blocks, dtype=torch.int16, device=device).view(-1, 1, 1, 1)
        first = torch.where(covered, block, num_blocks).amin(1)  # [rows, T or 1, H, W]
        first = first.expand(rows, *grid_size).flatten(1).float()
        return draw_classes(first, num_visible, generator, valid)

    def extra_repr(self) -> str:
        """For print(model)."""
        return (
            f"{super().extra_repr()}, scale={self.scale}, aspect_ratio={self.aspect_ratio}, "
            f"temporal_scale={self.temporal_scale}, num_blocks={self.num_blocks}"
        )


@torch.compiler.assume_constant_result
def enough_blocks(
    grid_size: GridSize, num_masked: int, block_size: tuple[int, int], aspect_ratio: tuple[float, float]
) -> int:
    """Blocks that mask M tokens in every simulated clip, and half as many again; 0 if 1000 do not mask M.

    It is always the same number.

    Args:
        grid_size: (T, H, W).
        num_masked: M.
        block_size: time steps of a block, and about how many positions of a frame it covers.
        aspect_ratio: the least and the largest height over width of a block.
    """
    return _simulated(grid_size, num_masked, block_size, aspect_ratio)


@functools.cache
def _simulated(
    grid_size: GridSize, num_masked: int, block_size: tuple[int, int], aspect_ratio: tuple[float, float]
) -> int:
    draws = random.Random(0)
    time, height, width = grid_size
    duration, area = block_size
    most = 0
    for _ in range(_SIMULATIONS):
        covered, blocks = 0, 0  # the tokens as bits of a number
        while covered.bit_count() < num_masked and blocks < _MOST_BLOCKS:
            aspect = draws.uniform(*aspect_ratio)
            rows = min(max(round(math.sqrt(area * aspect)), 1), height)
            columns = min(max(round(math.sqrt(area / aspect)), 1), width)
            start = (
                draws.randrange(time - duration + 1) * height + draws.randrange(height - rows + 1)
            ) * width + draws.randrange(width - columns + 1)
            block = ((1 << columns) - 1) * _ones(rows, width) * _ones(duration, height * width)
            covered |= block << start
            blocks += 1
        if covered.bit_count() < num_masked:
            return 0
        most = max(most, blocks)
    return min(math.ceil(1.5 * most), _MOST_BLOCKS)


def _ones(count: int, distance: int) -> int:
    """A number with `count` bits set, each `distance` bits above the one before."""
    return ((1 << count * distance) - 1) // ((1 << distance) - 1)
