"""assemble_tokens: the decoder's input, made of encoded visible tokens and mask tokens, with position embeddings."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.mask import MaskSample, free_to_read, target_idx
from adamae_sampler.ops.backend import backend_for, jit, launch, tl
from adamae_sampler.ops.checks import (
    check_device,
    check_floating,
    check_index_shape,
    check_indices,
    check_pos,
    check_tokens,
)
from adamae_sampler.ops.gather import gather_op, grad_of_pos, select_rows
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.rows import as_table, cast_once, place_of_token, row_tiles, rows_in_memory, tile_of

Order = Literal["concat", "restore"]

_MOST_PARTS = 1024  # parts of a sum. Their number depends on shapes alone, so every GPU adds in the same order

# ---------------------------------------------------------------------------------------------------- reference


def _assemble_tokens_reference(
    visible: Tensor, mask_token: Tensor, pos: Tensor, sample: MaskSample, order: Order
) -> Tensor:
    batch, num_visible, width = visible.shape
    token_idx = torch.cat([sample.visible_idx, target_idx(sample)], dim=1)  # [B, K + M], the order of "concat"
    fill = mask_token.to(visible.dtype).reshape(1, 1, width).expand(batch, 1, width)
    # A second expand, so that its gradient sums one axis at a time.
    fill = fill.expand(batch, token_idx.shape[1] - num_visible, width)
    concatenated = torch.cat([visible, fill], dim=1)  # [B, K + M, D]
    if order == "concat":
        return concatenated + select_rows(pos, token_idx).to(visible.dtype)
    return select_rows(concatenated, token_idx.argsort(dim=1)) + pos.to(visible.dtype)


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def _assemble_kernel(
    visible_ptr,
    mask_token_ptr,
    pos_ptr,
    visible_idx_ptr,
    masked_idx_ptr,
    place_ptr,
    out_ptr,
    num_rows,
    L,
    N,
    K,
    D,
    visible_stride_b,
    visible_stride_k,
    pos_stride_b,
    RESTORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each row is the visible token at `place`, or the mask token if `place` is -1, plus the position embedding of
    `token`. A clip has L rows and N tokens."""
    row, col, inside = tile_of(num_rows, D, ROWS, COLS)
    clip = (row // L).to(tl.int64)
    rank = row % L
    if RESTORE:
        token = rank.to(tl.int64)
        place = tl.load(place_ptr + row, mask=row < num_rows, other=-1)
    else:
        place = tl.where(rank < K, rank, -1)
        visible_idx = visible_idx_ptr + clip * K + rank
        masked_idx = masked_idx_ptr + clip * (L - K) + (rank - K)
        token = tl.load(visible_idx, mask=(row < num_rows) & (rank < K), other=0)
        token += tl.load(masked_idx, mask=(row < num_rows) & (rank >= K), other=0)
    value = tl.load(
        visible_ptr + clip * visible_stride_b + place.to(tl.int64) * visible_stride_k + col,
        mask=inside & (place >= 0),
        other=0.0,
    )
    mask_token = tl.load(mask_token_ptr + col, mask=col < D, other=0.0)
    value = tl.where(place == -1, mask_token.to(value.dtype).to(tl.float32), value.to(tl.float32))
    found = inside & (token >= 0) & (token < N) & (place >= -1)
    pos = tl.load(pos_ptr + clip * pos_stride_b + token * D + col, mask=found, other=float("nan"))
    value += pos.to(visible_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * D + col, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _sum_masked_rows_kernel(
    grad_ptr,
    place_ptr,
    partial_ptr,
    num_rows,
    rows_each,
    N,
    K,
    D,
    grad_stride_b,
    grad_stride_n,
    RESTORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """partial[i] = the sum of the masked rows among the i-th `rows_each` rows of grad."""
    tiles_across = tl.cdiv(D, COLS)
    part = tl.program_id(0) // tiles_across
    col = ((tl.program_id(0) % tiles_across) * COLS + tl.arange(0, COLS)[None, :]).to(tl.int64)
    first = part * rows_each
    stop = tl.minimum(first + rows_each, num_rows)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        rank = row % N
        if RESTORE:  # noqa: SIM108
            masked = tl.load(place_ptr + row, mask=row < stop, other=0) == -1
        else:
            masked = (row < stop) & (rank >= K)
        place = (row // N).to(tl.int64) * grad_stride_b + rank.to(tl.int64) * grad_stride_n + col
        total += tl.load(grad_ptr + place, mask=masked & (col < D), other=0.0).to(tl.float32)
    summed = tl.sum(total, axis=0)[None, :]
    tl.store(partial_ptr + part.to(tl.int64) * D + col, summed, mask=col < D)


# ---------------------------------------------------------------------------------------------------- operators


def _empty_assembled(
    visible: Tensor, mask_token: Tensor, pos: Tensor, visible_idx: Tensor, masked_idx: Tensor, restore: bool
) -> Tensor:
    return visible.new_empty(visible.shape[0], visible_idx.shape[1] + masked_idx.shape[1], visible.shape[2])


@operator(
    "assemble_tokens(Tensor visible, Tensor mask_token, Tensor pos, Tensor visible_idx, Tensor masked_idx, "
    "bool restore) -> Tensor",
    _empty_assembled,
)
def _assemble_op(
    visible: Tensor, mask_token: Tensor, pos: Tensor, visible_idx: Tensor, masked_idx: Tensor, restore: bool
) -> Tensor:
    """visible [B, K, D], mask_token [D], pos [1, N, D] or [B, N, D] -> [B, K + M, D]."""
    out = _empty_assembled(visible, mask_token, pos, visible_idx, masked_idx, restore)
    (batch, rows, width), num_tokens = out.shape, pos.shape[1]
    programs, tile = row_tiles(batch * rows, width)
    pos, visible = cast_once(pos, visible.dtype).contiguous(), rows_in_memory(visible)
    launch(
        _assemble_kernel,
        programs,
        visible,
        mask_token.contiguous(),
        pos,
        visible_idx.contiguous(),
        masked_idx.contiguous(),
        place_of_token(visible_idx, num_tokens) if restore else None,
        out,
        batch * rows,
        rows,
        num_tokens,
        visible.shape[1],
        width,
        *visible.stride()[:2],
        num_tokens * width * (pos.shape[0] > 1),
        RESTORE=restore,
        **tile,
    )
    return out


def _empty_sum(grad: Tensor, visible_idx: Tensor, restore: bool) -> Tensor:
    return grad.new_empty(grad.shape[2], dtype=torch.float32)


@operator("sum_masked_rows(Tensor grad, Tensor visible_idx, bool restore) -> Tensor", _empty_sum)
def _sum_masked_rows_op(grad: Tensor, visible_idx: Tensor, restore: bool) -> Tensor:
    """grad [B, N, D], in "restore" order if `restore`, else "concat" -> [D] fp32, the sum of its masked rows."""
    batch, num_tokens, width = grad.shape
    _, tile = row_tiles(batch * num_tokens, width)
    parts = min(_MOST_PARTS, -(-batch * num_tokens // tile["ROWS"]))
    rows_each = -(-batch * num_tokens // max(parts, 1))
    partial = grad.new_empty(parts, width, dtype=torch.float32)
    grad = rows_in_memory(grad)
    launch(
        _sum_masked_rows_kernel,
        parts * -(-width // tile["COLS"]),
        grad,
        place_of_token(visible_idx, num_tokens) if restore else None,
        partial,
        batch * num_tokens,
        rows_each,
        num_tokens,
        visible_idx.shape[1],
        width,
        *grad.stride()[:2],
        RESTORE=restore,
        **tile,
    )
    return partial.sum(0)


class _AssembleTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        visible: Tensor,
        mask_token: Tensor,
        pos: Tensor,
        visible_idx: Tensor,
        masked_idx: Tensor,
        restore: bool,
    ) -> Tensor:
        ctx.save_for_backward(visible_idx, masked_idx)
        ctx.restore, ctx.mask_token_dtype, ctx.pos_shape, ctx.pos_dtype = (
            restore,
            mask_token.dtype,
            pos.shape,
            pos.dtype,
        )
        assembled: Tensor = _assemble_op(visible, mask_token, pos, visible_idx, masked_idx, restore)
        return assembled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        visible_idx, masked_idx = ctx.saved_tensors
        needs_visible, needs_mask_token, needs_pos, *_ = ctx.needs_input_grad
        grad_visible = grad_mask_token = grad_pos = None
        if needs_visible:  # in "concat" order the visible tokens are the first rows
            grad_visible = gather_op(grad, visible_idx, None) if ctx.restore else grad[:, : visible_idx.shape[1]]
        if needs_mask_token:
            grad_mask_token = _sum_masked_rows_op(grad, visible_idx, ctx.restore).to(ctx.mask_token_dtype)
        if needs_pos and ctx.restore:
            grad_pos = (grad if ctx.pos_shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)).to(ctx.pos_dtype)
        elif needs_pos:
            grad_pos = grad_of_pos(grad, torch.cat([visible_idx, masked_idx], 1), ctx.pos_shape, ctx.pos_dtype)
        return grad_visible, grad_mask_token, grad_pos, None, None, None


# ------------------------------------------------------------------------------------------------------- public


def assemble_tokens(
    visible: Tensor, mask_token: Tensor, pos: Tensor, sample: MaskSample, order: Order = "concat"
) -> Tensor:
    """(visible + pos[visible_idx]) ++ (mask_token + pos[target_idx]) (Algorithm 2).

    `target_idx` is `sample.masked_idx`, or the part of it that is decoded.

    Args:
        visible: [B, K, D] encoded visible tokens, in the order of `sample.visible_idx`.
        mask_token: a tensor of D values, such as [D] or [1, 1, D]; the learned substitute for a masked token.
        pos: [N, D], [1, N, D] or [B, N, D] position embedding of the decoder.
        sample: the mask.
        order: "concat" puts the K visible tokens first and the M masked tokens after them, as in VideoMAE and AdaMAE;
            "restore" puts the tokens in t-h-w order, as in MAE.

    Returns:
        [B, N, D] in the dtype of `visible`; [B, K + decoded, D] if the sample has `decoded_idx`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or order; "restore" order for a sample with `decoded_idx`;
            an index out of range (checked on CPU in eager mode only). The kernel cannot raise without making the host
            wait. It gives NaN for an index out of range, and in "restore" order for a token that is visible twice.
    """
    check_tokens("visible", visible)
    if not isinstance(sample, MaskSample):
        raise TypeError(
            f"sample is {type(sample).__name__}, expected a MaskSample. To convert a boolean mask, use "
            "MaskSample.from_mask(mask, num_visible)."
        )
    batch, num_visible, width = visible.shape
    num_tokens = sample.mask.shape[1]
    if num_visible != sample.visible_idx.shape[1]:
        raise ValueError(
            f"visible holds {num_visible} tokens, expected {sample.visible_idx.shape[1]}, the sample's visible tokens."
        )
    check_index_shape("sample.visible_idx", sample.visible_idx, batch, visible.device)
    check_index_shape("sample.target_idx", target_idx(sample), batch, visible.device)
    check_floating("mask_token", mask_token)
    if mask_token.numel() != width:
        raise ValueError(
            f"mask_token has shape {tuple(mask_token.shape)}, expected {width} values, the width of visible."
        )
    check_device("mask_token", mask_token, visible.device)
    check_pos(pos, batch, num_tokens, width, visible.device)
    if order not in ("concat", "restore"):
        raise ValueError(f"order={order!r}, expected 'concat' (visible tokens first) or 'restore' (t-h-w order).")
    if sample.decoded_idx is not None and order == "restore":
        raise ValueError(
            "the sample leaves masked tokens out (decoded_idx), but order='restore' needs all tokens. Use "
            "order='concat'."
        )
    if visible.shape[1] + sample.masked_idx.shape[1] != num_tokens:
        raise ValueError(
            f"the sample has {visible.shape[1]} visible and {sample.masked_idx.shape[1]} masked tokens, expected "
            f"{num_tokens} together, the tokens of its mask."
        )
    if free_to_read(visible):
        both = torch.cat([sample.visible_idx, target_idx(sample)], 1)
        check_indices("sample's visible_idx and target_idx together", both, batch, num_tokens, visible.device)
    if backend_for(visible, mask_token, pos) == "triton":
        idx = (sample.visible_idx, target_idx(sample))
        restore = order == "restore"
        assembled: Tensor = _AssembleTokens.apply(visible, mask_token.reshape(-1), as_table(pos), *idx, restore)
        return assembled
    return _assemble_tokens_reference(visible, mask_token, pos, sample, order)
