"""sampling_loss: the loss that teaches the sampler to show tokens that are hard to reconstruct."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import at_least_fp32, check_device, check_floating, check_indices
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.rows import place_of_token

# The official code's Categorical clamps log p to this range: log eps and log(1 - eps), with the eps of fp32.
_EPS = torch.finfo(torch.float32).eps
LOG_PROB_RANGE = (math.log(_EPS), math.log1p(-_EPS))

# ---------------------------------------------------------------------------------------------------- reference


def _sampling_loss_reference(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    log_p = log_probs.gather(1, masked_idx).clamp(*LOG_PROB_RANGE)
    return -(log_p * error.detach()).mean()


# ------------------------------------------------------------------------------------------------------ kernels


@jit
def _sampling_loss_kernel(
    log_probs_ptr,
    masked_idx_ptr,
    error_ptr,
    partial_ptr,
    N,
    M,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """partial[b] = the sum over clip b's masked tokens of log p times error."""
    clip = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, M, TILE):
        place = (start + tl.arange(0, TILE)).to(tl.int64)
        token = tl.load(masked_idx_ptr + clip * M + place, mask=place < M)
        error = tl.load(error_ptr + clip * M + place, mask=place < M).to(tl.float32)
        found = (place < M) & (token >= 0) & (token < N)
        where = log_probs_ptr + clip * N + token
        log_p = tl.load(where, mask=found, other=float("nan")).to(tl.float32)
        clamped = tl.where(log_p < LOWEST, LOWEST, tl.where(log_p > HIGHEST, HIGHEST, log_p))  # NaN stays
        total += tl.where(place < M, clamped * error, 0.0)
    tl.store(partial_ptr + clip, tl.sum(total))


@jit
def _sampling_loss_backward_kernel(
    grad_ptr,
    log_probs_ptr,
    place_ptr,
    error_ptr,
    grad_log_probs_ptr,
    num_errors,
    N,
    M,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program writes a tile of one clip's gradient: -error / (B M) where masked and not clamped, else 0."""
    tiles = tl.cdiv(N, TILE)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    token = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    place = tl.load(place_ptr + clip * N + token, mask=token < N, other=-1)
    where = log_probs_ptr + clip * N + token
    log_p = tl.load(where, mask=token < N, other=0.0).to(tl.float32)
    learns = (place >= 0) & (log_p >= LOWEST) & (log_p <= HIGHEST)
    error = tl.load(error_ptr + clip * M + place, mask=learns, other=0.0)
    grad = -tl.load(grad_ptr) * error.to(tl.float32) / num_errors
    grad = tl.where(place == -2, float("nan"), tl.where(learns, grad, 0.0))
    tl.store(grad_log_probs_ptr + clip * N + token, grad, mask=token < N)


# ---------------------------------------------------------------------------------------------------- operators


def _empty_loss(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    return log_probs.new_empty((), dtype=torch.float32)


@operator("sampling_loss(Tensor log_probs, Tensor masked_idx, Tensor error) -> Tensor", _empty_loss)
def _sampling_loss_op(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    (batch, num_tokens), num_masked = log_probs.shape, masked_idx.shape[1]
    partial = log_probs.new_empty(batch, dtype=torch.float32)
    launch(
        _sampling_loss_kernel,
        batch,
        log_probs.contiguous(),
        masked_idx.contiguous(),
        error.contiguous(),
        partial,
        num_tokens,
        num_masked,
        LOWEST=LOG_PROB_RANGE[0],
        HIGHEST=LOG_PROB_RANGE[1],
        TILE=min(next_power_of_2(num_masked), 2048),
    )
    return partial.sum() / -(batch * num_masked)


def _empty_loss_grad(grad: Tensor, log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    return log_probs.new_empty(log_probs.shape, dtype=torch.float32)


@operator(
    "sampling_loss_backward(Tensor grad, Tensor log_probs, Tensor masked_idx, Tensor error) -> Tensor", _empty_loss_grad
)
def _sampling_loss_backward_op(grad: Tensor, log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    (batch, num_tokens), num_masked = log_probs.shape, masked_idx.shape[1]
    grad_log_probs = _empty_loss_grad(grad, log_probs, masked_idx, error)
    tile = min(next_power_of_2(num_tokens), 1024)
    launch(
        _sampling_loss_backward_kernel,
        batch * -(-num_tokens // tile),
        grad,
        log_probs.contiguous(),
        place_of_token(masked_idx, num_tokens),
        error.contiguous(),
        grad_log_probs,
        batch * num_masked,
        num_tokens,
        num_masked,
        LOWEST=LOG_PROB_RANGE[0],
        HIGHEST=LOG_PROB_RANGE[1],
        TILE=tile,
    )
    return grad_log_probs


class _SamplingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs, masked_idx, error)
        loss: Tensor = _sampling_loss_op(log_probs, masked_idx, error)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_probs, masked_idx, error = ctx.saved_tensors
        return _sampling_loss_backward_op(grad, log_probs, masked_idx, error).to(log_probs.dtype), None, None


# ------------------------------------------------------------------------------------------------------- public


def sampling_loss(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    """L_S = -mean over clips and masked tokens of log p_i * stop_gradient(e_i) (Algorithm 2).

    log p is clamped to [log eps, log(1 - eps)], eps = 2^-23, as in the official code. A token with almost no
    probability then neither dominates the loss nor gets a gradient. NaN stays NaN.

    Args:
        log_probs: [B, N], log of the sampler's distribution.
        masked_idx: [B, M] int64.
        error: [B, M], the reconstruction error of each masked token. No gradient flows into it.

    Returns:
        Scalar, fp32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; an index out of range (checked on CPU in eager
            mode only; the kernel gives NaN for it).
    """
    if log_probs is None:
        raise TypeError(
            "log_probs is None: masks that no network drew have no distribution to learn. Use AdaptiveTokenSampler."
        )
    check_floating("log_probs", log_probs)
    check_floating("error", error)
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs have shape {tuple(log_probs.shape)}, expected [B, N]: one value for each token.")
    check_device("error", error, log_probs.device)
    check_indices("masked_idx", masked_idx, log_probs.shape[0], log_probs.shape[1], log_probs.device)
    if error.shape != masked_idx.shape:
        raise ValueError(
            f"error has shape {tuple(error.shape)}, expected {tuple(masked_idx.shape)}: one value for each masked "
            "token."
        )
    if backend_for(log_probs, error) == "triton":
        loss: Tensor = _SamplingLoss.apply(log_probs, masked_idx, error.detach())
        return loss
    return _sampling_loss_reference(at_least_fp32(log_probs), masked_idx, at_least_fp32(error))
