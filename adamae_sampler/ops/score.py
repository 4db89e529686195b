"""token_scores: one number for each token, in fp32, from tokens in any precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import check_device, check_tokens
from adamae_sampler.ops.registration import operator

_WIDEST = 8192

# ---------------------------------------------------------------------------------------------------- reference


def _token_scores_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), weight[None].to(dtype), bias.to(dtype)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _token_scores_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out = x . weight + bias, several rows for each program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    place = row.to(tl.int64) * D + col
    value = tl.load(x_ptr + place, mask=(row < num_rows) & (col < D), other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    score = tl.sum(value * weight, 1)[:, None] + tl.load(bias_ptr).to(tl.float32)
    tl.store(out_ptr + row, score, mask=row < num_rows)


# ----------------------------------------------------------------------------------------------------- operator


def _empty_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@operator("token_scores(Tensor x, Tensor weight, Tensor bias) -> Tensor", _empty_scores)
def _token_scores_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, N, D], weight [D], bias [1] -> [B, N] fp32."""
    out = _empty_scores(x, weight, bias)
    cols = next_power_of_2(x.shape[2])
    rows = max(1, 4096 // cols)
    sizes = (out.numel(), x.shape[2])
    inputs = (x.contiguous(), weight.contiguous(), bias)
    launch(_token_scores_kernel, -(-out.numel() // rows), *inputs, out, *sizes, ROWS=rows, COLS=cols)
    return out


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        scores: Tensor = _token_scores_op(x, weight, bias)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Products in half precision, as autocast does. The column is scaled to at most 1, since fp16 has no small
        # numbers.
        scale = grad.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) if grad.numel() else grad.sum()
        column = (grad / scale).to(x.dtype).reshape(-1, 1)  # [B N, 1]
        grad_x = (column @ (weight * scale).to(x.dtype)[None]).view_as(x)
        grad_weight = ((column.t() @ x.reshape(-1, x.shape[2]))[0].float() * scale).to(weight.dtype)
        return grad_x, grad_weight, grad.sum().to(ctx.bias_dtype).reshape(1)


# ------------------------------------------------------------------------------------------------------- public


def token_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x . weight + bias in fp32, the last layer of a score network; also fp32 under autocast, without a copy of x.

    Half precision has too few digits for the log-probabilities of 1568 tokens.

    Args:
        x: [B, N, D].
        weight: [D].
        bias: [1].

    Returns:
        [B, N] fp32; fp64 for tokens in fp64.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    check_tokens("x", x)
    for name, each, shape in (("weight", weight, (x.shape[2],)), ("bias", bias, (1,))):
        check_device(name, each, x.device)
        if each.shape != shape:
            raise ValueError(f"{name} has shape {tuple(each.shape)}, expected {shape}, to go with x.")
    obstacle = f"the kernel takes rows of up to {_WIDEST} values, not {x.shape[2]}" if x.shape[2] > _WIDEST else ""
    if not torch.compiler.is_compiling() and backend_for(x, weight, bias, obstacle=obstacle) == "triton":
        scores: Tensor = _TokenScores.apply(x, weight, bias)
        return scores
    return _token_scores_reference(x, weight, bias)
