"""Position tables at other grids than their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GridSize = tuple[int, int, int]


def resample(table: Tensor, grid_size: GridSize, to: GridSize) -> Tensor:
    """A table of one grid at another, by trilinear interpolation over the same extent (`align_corners=False`).

    One matrix for each axis does it, so the gradient is deterministic on a GPU, where that of `F.interpolate` is not.

    Args:
        table: [1, N, D], N = T H W.
        grid_size: (T, H, W) of the table.
        to: (T, H, W) of the result.

    Returns:
        [1, N', D]; the table itself if the grids are equal.
    """
    if grid_size == to:
        return table
    grid = table.unflatten(1, grid_size)  # [1, T, H, W, D]
    for axis, (old, new) in enumerate(zip(grid_size, to, strict=True), start=1):
        if old != new:
            dtype = torch.promote_types(table.dtype, torch.float32)
            identity = torch.eye(old, device=table.device, dtype=dtype)[None]
            weights = F.interpolate(identity, new, mode="linear")[0].to(table.dtype)  # [old, new]
            grid = torch.tensordot(grid, weights, dims=([axis], [0])).movedim(-1, axis)
    return grid.flatten(1, 3)
