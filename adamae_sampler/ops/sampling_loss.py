"""sampling_loss: the loss that teaches the sampler to show what is hard to reconstruct."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamae_sampler.ops.checks import at_least_fp32, check_device, check_floating, check_indices

# Where the official code's Categorical stops: log of the fp32 epsilon, and of one minus it.
_EPS = torch.finfo(torch.float32).eps
_LOG_PROB_RANGE = (math.log(_EPS), math.log1p(-_EPS))


def _sampling_loss_reference(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    log_p = log_probs.gather(1, masked_idx).clamp(*_LOG_PROB_RANGE)
    return -(log_p * error.detach()).mean()


def sampling_loss(log_probs: Tensor, masked_idx: Tensor, error: Tensor) -> Tensor:
    """L_S = -mean over clips and masked tokens of log p_i * stop_gradient(e_i) (Algorithm 2).

    log p is clamped to [log eps, log(1 - eps)], eps = 2^-23, as in the official code: a token that the sampler
    has all but ruled out neither dominates the loss nor pushes further. NaN is not clamped away.

    Args:
        log_probs: [B, N], log of the sampler's distribution.
        masked_idx: [B, M] int64.
        error: [B, M], the reconstruction error of each masked token. No gradient flows into it.

    Returns:
        Scalar, fp32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; an index out of range (checked on CPU in eager
            mode only).
    """
    check_floating("log_probs", log_probs)
    check_floating("error", error)
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs have shape {tuple(log_probs.shape)}, expected [B, N]: one for each token.")
    check_device("error", error, log_probs.device)
    check_indices("masked_idx", masked_idx, log_probs.shape[0], log_probs.shape[1], log_probs.device)
    if error.shape != masked_idx.shape:
        raise ValueError(
            f"error has shape {tuple(error.shape)}, expected {tuple(masked_idx.shape)}: one for each masked token."
        )
    return _sampling_loss_reference(at_least_fp32(log_probs), masked_idx, at_least_fp32(error))
