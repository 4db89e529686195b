"""Helpers of the kernels that move whole rows: tiles of rows and columns, and the row of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.ops.backend import jit, launch, next_power_of_2, tl

_TILE = 2048  # elements that a program moves: 16 for each thread
_MAX_ROWS = 2**30  # rows are counted in 32 bits, elements in 64


def as_table(pos: Tensor) -> Tensor:
    """A position embedding as [1, N, D] or [B, N, D]."""
    return pos if pos.ndim == 3 else pos[None]


def cast_once(pos: Tensor, dtype: torch.dtype) -> Tensor:
    """A table shared by all clips, cast to their dtype. In half precision each clip then reads half the bytes."""
    return pos.to(dtype) if pos.shape[0] == 1 else pos


def rows_in_memory(x: Tensor) -> Tensor:
    """x [B, N, D] with contiguous rows, as the kernels need them. Copies x only if its rows are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_tiles(num_rows: int, width: int) -> tuple[int, dict[str, int]]:
    """The number of programs that cover num_rows rows of a width, and the tile of each, as the kernel's constants.

    A tile has as many columns as the largest power of two that divides the width, if that is at least 64, and at most
    1024. Then no lane idles: a width of 768 is three tiles of 256.

    Raises:
        ValueError: there are more than 2^30 rows.
    """
    if num_rows > _MAX_ROWS:
        raise ValueError(f"{num_rows} rows (clips x tokens), expected at most {_MAX_ROWS}; split the batch.")
    even = width & -width  # the largest power of two that divides the width
    cols = min(even if even >= 64 else next_power_of_2(width), _TILE // 2)
    rows = _TILE // cols
    programs = -(-num_rows // rows) * -(-width // cols)
    return programs, {"ROWS": rows, "COLS": cols, "num_warps": 4}


@jit
def tile_of(num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS, 1] int32 and columns [1, COLS] int64, and which of its elements exist [ROWS, COLS].

    Neighbouring programs take neighbouring columns of the same rows.
    """
    tiles_across = tl.cdiv(num_cols, COLS)
    program = tl.program_id(0)
    row = (program // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % tiles_across) * COLS + tl.arange(0, COLS)[None, :]
    return row, col.to(tl.int64), (row < num_rows) & (col < num_cols)


@jit
def _place_of_token_kernel(idx_ptr, place_ptr, N, K, TILE: tl.constexpr):
    """One program handles one clip. Its threads overwrite each other's values, so barriers separate the three steps."""
    clip = tl.program_id(0).to(tl.int64)
    idx_ptr += clip * K
    place_ptr += clip * N
    lane = tl.arange(0, TILE)
    for start in range(0, N, TILE):
        tl.store(place_ptr + start + lane, -1, mask=start + lane < N)
    tl.debug_barrier()
    for start in range(0, K, TILE):
        place = start + lane
        token = tl.load(idx_ptr + place, mask=place < K, other=-1)
        tl.store(place_ptr + token, place, mask=(token >= 0) & (token < N))
    tl.debug_barrier()
    for start in range(0, K, TILE):
        place = start + lane
        token = tl.load(idx_ptr + place, mask=place < K, other=-1)
        named = (token >= 0) & (token < N)
        overwritten = tl.load(place_ptr + token, mask=named, other=0) != place
        tl.store(place_ptr + token, -2, mask=named & overwritten)


def place_of_token(idx: Tensor, num_tokens: int) -> Tensor:
    """The inverse of idx [B, K], [B, N] int32: k if idx[b, k] = n; -1 if idx[b] lacks n; -2 if it has n several times.

    Indices out of range are left out. Only operators call this function.
    """
    batch, places = idx.shape
    place = torch.empty(batch, num_tokens, dtype=torch.int32, device=idx.device)
    tile = min(next_power_of_2(num_tokens), 4096)
    warps = max(1, min(tile // 256, 8))
    launch(_place_of_token_kernel, batch, idx.contiguous(), place, num_tokens, places, TILE=tile, num_warps=warps)
    return place
