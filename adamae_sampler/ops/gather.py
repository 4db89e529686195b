"""gather_tokens: the visible tokens of each clip with their position embedding, for one mask or for several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for, jit, launch, tl
from adamae_sampler.ops.checks import check_indices, check_pos, check_tokens
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.rows import as_table, cast_once, place_of_token, row_tiles, rows_in_memory, tile_of

# ---------------------------------------------------------------------------------------------------- reference


def _gather_tokens_reference(x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
    gathered = select_rows(x, idx)
    return gathered if pos is None else gathered + select_rows(pos, idx).to(gathered.dtype)


def select_rows(x: Tensor, idx: Tensor) -> Tensor:
    """x [B, N, D], [1, N, D] or [N, D], idx [B R, K] -> [B R, K, D].

    `index_select` on a flat table copies whole rows. `torch.gather` would read one index for every element.
    """
    num_tokens, width = x.shape[-2:]
    if x.ndim == 3 and x.shape[0] > 1:
        clip = torch.arange(idx.shape[0], device=idx.device) // (idx.shape[0] // x.shape[0])  # [B R]
        idx_flat = idx + clip[:, None] * num_tokens  # [B R, K] into [B N]
    else:
        idx_flat = idx  # one table for all clips
    return x.reshape(-1, width).index_select(0, idx_flat.reshape(-1)).view(*idx.shape, width)


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def _gather_kernel(
    x_ptr,
    idx_ptr,
    pos_ptr,
    out_ptr,
    num_rows,
    N,
    K,
    D,
    R,
    x_stride_b,
    x_stride_n,
    pos_stride_b,
    HAS_POS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[i, k] = x[i // R, idx[i, k]] + pos[i // R, idx[i, k]]; NaN where the index is out of range."""
    row, col, inside = tile_of(num_rows, D, ROWS, COLS)
    drawn = (row // K).to(tl.int64)
    clip = drawn // R
    token = tl.load(idx_ptr + row, mask=row < num_rows, other=0)
    found = inside & (token >= 0) & (token < N)
    value = tl.load(x_ptr + clip * x_stride_b + token * x_stride_n + col, mask=found, other=float("nan"))
    if HAS_POS:
        pos = tl.load(pos_ptr + clip * pos_stride_b + token * D + col, mask=found, other=0.0)
        value = value.to(tl.float32) + pos.to(value.dtype).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * D + col, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _scatter_kernel(
    grad_ptr,
    place_ptr,
    out_ptr,
    num_rows,
    N,
    D,
    R,
    grad_stride_b,
    grad_stride_k,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[b, n] = the sum of grad[i, place[i, n]] over the R masks i of clip b; 0 if no mask has token n. This is the
    transpose of a gather, with plain writes."""
    row, col, inside = tile_of(num_rows, D, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for r in range(R):
        drawn = (row // N).to(tl.int64) * R + r
        place = tl.load(place_ptr + drawn * N + row % N, mask=row < num_rows, other=-1)
        value = tl.load(
            grad_ptr + drawn * grad_stride_b + place.to(tl.int64) * grad_stride_k + col,
            mask=inside & (place >= 0),
            other=0.0,
        )
        total += tl.where(place == -2, float("nan"), value.to(tl.float32))
    tl.store(out_ptr + row.to(tl.int64) * D + col, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _scatter_sum_kernel(
    grad_ptr,
    place_ptr,
    out_ptr,
    batch,
    N,
    D,
    grad_stride_b,
    grad_stride_k,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[n] = the sum over clips b of grad[b, place[b, n]], for one token, ROWS clips at a time."""
    tiles_across = tl.cdiv(D, COLS)
    token = tl.program_id(0) // tiles_across
    col = ((tl.program_id(0) % tiles_across) * COLS + tl.arange(0, COLS)[None, :]).to(tl.int64)
    total = tl.zeros((ROWS, COLS), tl.float32)
    twice = tl.full((ROWS, 1), 0, tl.int32)
    for start in range(0, batch, ROWS):
        clip = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        place = tl.load(place_ptr + clip * N + token, mask=clip < batch, other=-1)
        twice += (place == -2).to(tl.int32)
        row = grad_ptr + clip * grad_stride_b + place.to(tl.int64) * grad_stride_k
        total += tl.load(row + col, mask=(place >= 0) & (col < D), other=0.0).to(tl.float32)
    summed = tl.sum(tl.where(twice > 0, float("nan"), total), 0)[None, :]
    tl.store(out_ptr + token.to(tl.int64) * D + col, summed.to(out_ptr.dtype.element_ty), mask=col < D)


# ---------------------------------------------------------------------------------------------------- operators


def _empty_gathered(x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
    return x.new_empty(*idx.shape, x.shape[2])


@operator("gather_tokens(Tensor x, Tensor idx, Tensor? pos) -> Tensor", _empty_gathered)
def gather_op(x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
    """x [B, N, D], idx [B R, K], pos [1, N, D] or [B, N, D] -> [B R, K, D]."""
    out = _empty_gathered(x, idx, pos)
    (batch, num_tokens, width), (draws, places) = x.shape, idx.shape
    programs, tile = row_tiles(draws * places, width)
    pos = None if pos is None else cast_once(pos, x.dtype).contiguous()
    x = rows_in_memory(x)
    launch(
        _gather_kernel,
        programs,
        x,
        idx.contiguous(),
        pos,
        out,
        draws * places,
        num_tokens,
        places,
        width,
        draws // max(batch, 1),
        *x.stride()[:2],
        None if pos is None else num_tokens * width * (pos.shape[0] > 1),
        HAS_POS=pos is not None,
        **tile,
    )
    return out


def _empty_scattered(grad: Tensor, idx: Tensor, batch: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(batch, num_tokens, grad.shape[2], dtype=dtype)


@operator(
    "scatter_tokens(Tensor grad, Tensor idx, SymInt batch, SymInt num_tokens, ScalarType dtype) -> Tensor",
    _empty_scattered,
)
def scatter_op(grad: Tensor, idx: Tensor, batch: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """grad [B R, K, D], idx [B R, K] -> [B, N, D] of the dtype, summed over a clip's masks; 0 for tokens not in
    idx."""
    out = _empty_scattered(grad, idx, batch, num_tokens, dtype)
    draws, _, width = grad.shape
    rows = batch * num_tokens
    programs, tile = row_tiles(rows, width)
    place, grad = place_of_token(idx, num_tokens), rows_in_memory(grad)
    sizes = (rows, num_tokens, width, draws // max(batch, 1))
    launch(_scatter_kernel, programs, grad, place, out, *sizes, *grad.stride()[:2], **tile)
    return out


def _empty_scattered_sum(grad: Tensor, idx: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(1, num_tokens, grad.shape[2], dtype=dtype)


@operator(
    "scatter_tokens_sum(Tensor grad, Tensor idx, SymInt num_tokens, ScalarType dtype) -> Tensor", _empty_scattered_sum
)
def scatter_sum_op(grad: Tensor, idx: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """grad [B R, K, D], idx [B R, K] -> [1, N, D], summed over all masks."""
    out = _empty_scattered_sum(grad, idx, num_tokens, dtype)
    batch, _, width = grad.shape
    _, tile = row_tiles(batch, width)
    place, grad = place_of_token(idx, num_tokens), rows_in_memory(grad)
    programs = num_tokens * -(-width // tile["COLS"])
    launch(_scatter_sum_kernel, programs, grad, place, out, batch, num_tokens, width, *grad.stride()[:2], **tile)
    return out


def grad_of_pos(grad: Tensor, idx: Tensor, pos_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of a position embedding [1, N, D] or [B, N, D] that was added to rows `idx` [B R, K]."""
    if pos_shape[0] == 1:
        summed: Tensor = scatter_sum_op(grad, idx, pos_shape[1], dtype)
        return summed
    scattered: Tensor = scatter_op(grad, idx, *pos_shape[:2], dtype)
    return scattered


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.batch, ctx.num_tokens, ctx.dtype = x.shape[0], x.shape[1], x.dtype
        ctx.pos_shape, ctx.pos_dtype = (None, None) if pos is None else (pos.shape, pos.dtype)
        gathered: Tensor = gather_op(x, idx, pos)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        needs_x, _, needs_pos = ctx.needs_input_grad
        grad_x = scatter_op(grad, idx, ctx.batch, ctx.num_tokens, ctx.dtype) if needs_x else None
        return grad_x, None, grad_of_pos(grad, idx, ctx.pos_shape, ctx.pos_dtype) if needs_pos else None


# ------------------------------------------------------------------------------------------------------- public


def gather_tokens(x: Tensor, idx: Tensor, pos: Tensor | None = None) -> Tensor:
    """x[b, idx[b]] + pos[idx[b]] for every clip b; or x[i // R, idx[i]] + pos[idx[i]] for R masks of each clip.

    Args:
        x: [B, N, D] tokens.
        idx: [B, K] or [B R, K] int64, the tokens to take, distinct within a row; R rows for each clip, clip by clip.
        pos: [N, D], [1, N, D] or [B, N, D] position embedding, cast to the tokens' dtype. It is added after the
            gather, so only K of N rows are read.

    Returns:
        [B R, K, D] in the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; an index out of range (checked on CPU in eager mode
            only). The kernel cannot raise without making the host wait. It gives NaN for an index out of range, and a
            NaN gradient for a token that a row of idx names twice.

    >>> import torch
    >>> gather_tokens(torch.arange(8.0).view(1, 4, 2), torch.tensor([[1, 3]])).tolist()
    [[[2.0, 3.0], [6.0, 7.0]]]
    """
    check_tokens("x", x)
    check_indices("idx", idx, x.shape[0], x.shape[1], x.device, several=True)
    if pos is not None:
        check_pos(pos, x.shape[0], x.shape[1], x.shape[2], x.device)
    if backend_for(x, *([] if pos is None else [pos])) == "triton":
        gathered: Tensor = _GatherTokens.apply(x, idx, None if pos is None else as_table(pos))
        return gathered
    return _gather_tokens_reference(x, idx, pos)
