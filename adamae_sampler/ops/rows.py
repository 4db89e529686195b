"""What the kernels that move whole rows share: tiles of rows and columns, and where a token's row went."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.ops.backend import jit, launch, next_power_of_2, tl

_TILE = 2048  # elements a program moves: 16 a thread
_MAX_ROWS = 2**30  # rows are counted in 32 bits, elements in 64


def as_table(pos: Tensor) -> Tensor:
    """A position embedding as [1, N, D] or [B, N, D]."""
    return pos if pos.ndim == 3 else pos[None]


def cast_once(pos: Tensor, dtype: torch.dtype) -> Tensor:
    """A table that every clip reads, in the clips' dtype; half the bytes then come from the cache for each of them."""
    return pos.to(dtype) if pos.shape[0] == 1 else pos


def rows_in_memory(x: Tensor) -> Tensor:
    """x [B, N, D] with the values of a row next to each other, as the kernels read them; it is so almost always."""
    return x if x.stride(-1) == 1 else x.contiguous()


def row_tiles(num_rows: int, width: int) -> tuple[int, dict[str, int]]:
    """How many programs cover num_rows rows of a width, and the tile of each, as the kernel's constants.

    Columns are as many as divide the width, if that is a power of two worth its while, so that no lane idles: a
    width of 768 is three tiles of 256.

    Raises:
        ValueError: more rows than 32 bits count.
    """
    if num_rows > _MAX_ROWS:
        raise ValueError(f"{num_rows} rows (clips x tokens), the kernels count up to {_MAX_ROWS}; split the batch.")
    even = width & -width  # the largest power of two that divides the width
    cols = min(even if even >= 64 else next_power_of_2(width), _TILE // 2)
    rows = _TILE // cols
    programs = -(-num_rows // rows) * -(-width // cols)
    return programs, {"ROWS": rows, "COLS": cols, "num_warps": 4}


@jit
def tile_of(num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows [ROWS, 1] int32, columns [1, COLS] int64, and which of their places exist [ROWS, COLS].

    Neighbouring programs take the columns of the same rows, which are neighbours in memory.
    """
    tiles_across = tl.cdiv(num_cols, COLS)
    program = tl.program_id(0)
    row = (program // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (program % tiles_across) * COLS + tl.arange(0, COLS)[None, :]
    return row, col.to(tl.int64), (row < num_rows) & (col < num_cols)


@jit
def _place_of_token_kernel(idx_ptr, place_ptr, N, K, TILE: tl.constexpr):
    """One clip a program. Its threads write over each other's places, so a barrier parts the three steps."""
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
    """The inverse of idx [B, K]: [B, N] int32, k where idx[b, k] is n, -1 where none is, -2 where several are.

    Indices out of range are left out. Called inside of operators only.
    """
    batch, places = idx.shape
    place = torch.empty(batch, num_tokens, dtype=torch.int32, device=idx.device)
    tile = min(next_power_of_2(num_tokens), 4096)
    warps = max(1, min(tile // 256, 8))
    launch(_place_of_token_kernel, batch, idx.contiguous(), place, num_tokens, places, TILE=tile, num_warps=warps)
    return place
