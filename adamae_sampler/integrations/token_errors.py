"""The errors of single tokens, for hosts that compute their mean alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample, target_valid


def errors_by_gradient(sampling: Callable[[Tensor], Tensor], sample: MaskSample) -> Tensor:
    """The errors of the masked tokens [B, M].

    L_S is minus the mean of log p_i e_i over the tokens that count, so e_i is minus its derivative by log p_i, times
    their number.

    Args:
        sampling: log-probabilities [B, N] -> L_S.
        sample: the mask.
    """
    log_probs = torch.full(sample.mask.shape, -1.0, device=sample.mask.device)
    if torch.compiler.is_compiling():  # torch.func.grad compiles; in eager mode it does not take the package's kernels
        gradient = torch.func.grad(sampling)(log_probs)
    else:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(sampling(log_probs.requires_grad_()), log_probs)
    counted = target_valid(sample)
    return -gradient.gather(1, sample.masked_idx) * (sample.masked_idx.numel() if counted is None else counted.sum())
