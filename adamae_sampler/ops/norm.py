"""add_norm: a residual sum and its LayerNorm, in one pass over the rows forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import check_device, check_floating
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.rows import rows_in_memory

_WIDEST = 4096  # the most values of a row that a program holds
_MOST_PARTS = 2112  # parts of a sum. Their number depends on shapes alone, so every GPU adds in the same order

# ---------------------------------------------------------------------------------------------------- reference


def _add_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    if total.device.type != "cpu":  # on a CPU alone, torch takes weights of another dtype
        weight, bias = weight.to(total.dtype), bias.to(total.dtype)
    with torch.autocast(total.device.type, enabled=False):  # autocast would norm and keep an fp32 copy
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def _add_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    statistics_ptr,
    num_rows,
    N,
    D,
    eps,
    x_stride_b,
    x_stride_n,
    branch_stride_b,
    branch_stride_n,
    HAS_BRANCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """total = x + branch, rounded; normed = its LayerNorm; statistics = the means of all rows, then 1 / deviation."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < num_rows) & (col < D)
    place = row.to(tl.int64) * D + col
    clip, token = (row // N).to(tl.int64), (row % N).to(tl.int64)
    value = tl.load(x_ptr + clip * x_stride_b + token * x_stride_n + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = branch_ptr + clip * branch_stride_b + token * branch_stride_n + col
        value += tl.load(branch, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, 1)[:, None] / D
    value = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1)[:, None] / D + eps)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    normed = value * rstd * weight + bias
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(statistics_ptr + row, mean, mask=row < num_rows)
    tl.store(statistics_ptr + (num_rows + row), rstd, mask=row < num_rows)


@jit
def _add_norm_backward_kernel(
    grad_normed_ptr,
    grad_total_ptr,
    total_ptr,
    weight_ptr,
    statistics_ptr,
    out_ptr,
    parts_ptr,
    num_rows,
    rows_each,
    D,
    HAS_TOTAL: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradient of both summands, row by row, and this program's part of the gradients of weight and bias."""
    col = tl.arange(0, COLS)
    inside = col < D
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((COLS,), tl.float32)
    grad_bias = tl.zeros((COLS,), tl.float32)
    first = tl.program_id(0) * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        place = tl.cast(row, tl.int64) * D + col
        grad = tl.load(grad_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row)
        rstd = tl.load(statistics_ptr + (num_rows + row))
        normal = (total - mean) * rstd
        grad_bias += grad
        grad_weight += grad * normal
        grad *= weight  # 0 beyond the width
        grad = (grad - tl.sum(grad) / D - normal * (tl.sum(grad * normal) / D)) * rstd
        if HAS_TOTAL:
            grad += tl.load(grad_total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, grad.to(out_ptr.dtype.element_ty), mask=inside)
    part = parts_ptr + tl.program_id(0) * D + col
    tl.store(part, grad_weight, mask=inside)
    tl.store(part + tl.num_programs(0) * D, grad_bias, mask=inside)


# ---------------------------------------------------------------------------------------------------- operators


def _as_tokens(x: Tensor) -> Tensor:
    """[..., D] as [B, N, D], each row contiguous. Rows may have gaps between them, as in a slice of tokens."""
    return rows_in_memory(x) if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]).contiguous()


def _empty_normed(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if branch is None:
        dtype, total = x.dtype, x.new_empty(0)
    else:
        dtype = torch.promote_types(x.dtype, branch.dtype)
        total = x.new_empty(*x.shape, dtype=dtype)
    return total, x.new_empty(*x.shape, dtype=dtype), x.new_empty(2, *x.shape[:-1], dtype=torch.float32)


@operator(
    "add_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _empty_normed,
)
def _add_norm_op(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D], branch the same or None -> the sum (empty without a branch), its norm, and mean and 1 / deviation
    [2, ...] fp32."""
    total, normed, statistics = _empty_normed(x, branch, weight, bias, eps)
    width = x.shape[-1]
    rows, cols = statistics.numel() // 2, next_power_of_2(width)
    rows_each = max(1, 4096 // cols)
    x = _as_tokens(x)
    branch = None if branch is None else _as_tokens(branch)
    launch(
        _add_norm_kernel,
        -(-rows // rows_each),
        x,
        branch,
        weight.contiguous(),
        bias.contiguous(),
        total,
        normed,
        statistics,
        rows,
        x.shape[1],
        width,
        eps,
        *x.stride()[:2],
        *((None, None) if branch is None else branch.stride()[:2]),
        HAS_BRANCH=branch is not None,
        ROWS=rows_each,
        COLS=cols,
        num_warps=4,
    )
    return total, normed, statistics


def _empty_grads(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(*total.shape), weight.new_empty(2, total.shape[-1], dtype=torch.float32)


@operator(
    "add_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor statistics) "
    "-> (Tensor, Tensor)",
    _empty_grads,
)
def _add_norm_backward_op(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the summands (one tensor for both), and the gradients of weight and bias [2, D] fp32."""
    grad = total.new_empty(*total.shape)
    rows, width, total = statistics.numel() // 2, total.shape[-1], total.contiguous()
    parts, cols = min(_MOST_PARTS, rows), next_power_of_2(width)
    sums = weight.new_empty(2, parts, width, dtype=torch.float32)
    launch(
        _add_norm_backward_kernel,
        parts,
        grad_normed.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total,
        weight.contiguous(),
        statistics,
        grad,
        sums,
        rows,
        -(-rows // max(parts, 1)),
        width,
        HAS_TOTAL=grad_total is not None,
        COLS=cols,
        num_warps=max(1, min(cols // 256, 8)),  # eight values for each thread
    )
    return grad, sums.sum(1)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, statistics = _add_norm_op(x, branch, weight, bias, eps)
        ctx.save_for_backward(x if branch is None else total, weight, statistics)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype, bias.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, statistics = ctx.saved_tensors
        of_x, of_branch, of_bias = ctx.dtypes
        grad_total = None if of_branch is None else grad_total
        if grad_normed is None:  # the norm is not used
            return grad_total, grad_total, None, None, None
        grad, of_both = _add_norm_backward_op(grad_normed, grad_total, total, weight, statistics)
        grad_weight, grad_bias = of_both.unbind()
        grad_branch = None if of_branch is None else grad.to(of_branch)
        return grad.to(of_x), grad_branch, grad_weight.to(weight.dtype), grad_bias.to(of_bias), None


# ------------------------------------------------------------------------------------------------------- public


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + branch and its LayerNorm, for pre-norm blocks, in the dtype of the sum; statistics are fp32.

    The dtype is the same under autocast. There torch's own norm casts its input to fp32, keeps that copy for the
    backward pass and returns fp32. `torch.compile` gets plain PyTorch, since it fuses these operations itself.

    Args:
        x: [..., D], the residual stream.
        branch: [..., D], the summand; None adds nothing.
        weight: [D].
        bias: [D].
        eps: added to the variance.

    Returns:
        The sum [..., D] (x itself without a branch), and the norm of the rounded sum [..., D].

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    device, width = x.device, x.shape[-1:]
    for name, each, shape in (("branch", branch, x.shape), ("weight", weight, width), ("bias", bias, width)):
        if each is not None:
            check_device(name, each, device)
            if each.shape != shape:
                raise ValueError(f"{name} has shape {tuple(each.shape)}, expected {tuple(shape)}, to go with x.")
    obstacle = f"the kernel takes rows of up to {_WIDEST} values, not {width[0]}" if width[0] > _WIDEST else ""
    tensors = (x, weight, bias) if branch is None else (x, weight, bias, branch)
    if not torch.compiler.is_compiling() and backend_for(*tensors, obstacle=obstacle) == "triton":
        total, normed = _AddNorm.apply(x, branch, weight, bias, eps)
        return x if branch is None else total, normed
    return _add_norm_reference(x, branch, weight, bias, eps)
