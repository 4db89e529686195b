"""Mask units: hosts that mask several tokens together."""

from __future__ import annotations

from torch import Tensor


def unit_mean(x: Tensor, positions: list[int], units: list[int]) -> Tensor:
    """[B, positions, D] -> [B, units, D]: means over the spatial positions of each mask unit.

    Args:
        x: a vector for each spatial position.
        positions: the grid of spatial positions, one to three axes.
        units: the grid of mask units, with as many axes.
    """
    sizes = [position // unit for position, unit in zip(positions, units, strict=True)]
    grid = [each for pair in zip(units, sizes, strict=True) for each in pair]  # axes alternate: units, positions within
    within = tuple(range(2, 2 * len(units) + 1, 2))
    return x.view(x.shape[0], *grid, x.shape[-1]).mean(dim=within).flatten(1, -2)
