"""How likely a set of tokens is to be drawn without replacement: what the exact policy gradient differentiates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample

_BISECTIONS = 20
# Nodes of the trapezoidal rule in standard deviations of the integrand, around its mode. To the left it falls like
# exp(s) at the slowest, to the right faster than a normal density; its rule converges as fast as exp(-1/step^2).
_FROM, _TO, _STEP = -18.0, 6.0, 0.5


def set_log_prob(sample: MaskSample) -> Tensor:
    """log P(S), [B]: that the first K of tokens drawn one after the other from p, without replacement, are the visible
    ones, in whatever order (Plackett-Luce). Its gradient goes to `sample.log_probs`.

    A token is drawn at a time that is exponential with rate p_i; S comes first if all its times lie before the first of
    the others, which is exponential with rate W, the sum of their p (Kool et al., 2020, "Estimating Gradients for
    Discrete Random Variables by Sampling without Replacement", appendix B). With t = exp(s) in units of 1 / W,

        P(S) = integral over s of exp(h(s)),   h(s) = s - exp(s) + sum over S of log(1 - exp(-p_i / W exp(s))),

        whose integrand is log-concave with its mode at exp(s) between 1 and 1 + K; it is integrated numerically.

    Args:
        sample: a mask with log-probabilities.

    Raises:
        ValueError: it has none.
    """
    if sample.log_probs is None:
        raise ValueError("sample.log_probs is None: random, tube and frame masks have no distribution to learn.")
    visible = sample.log_probs.gather(1, sample.visible_idx)  # [B, K]
    others = sample.log_probs.gather(1, sample.masked_idx).logsumexp(1, keepdim=True)  # [B, 1], log W
    log_rate = visible - others  # [B, K], of p_i / W
    with torch.no_grad():
        mode, width = _mode(log_rate)  # [B, 1] each
        node = torch.arange(_FROM, _TO + _STEP, _STEP, device=mode.device, dtype=mode.dtype)  # [Q]
        s = mode + width * node  # [B, Q]
    log_x = log_rate[:, :, None] + s[:, None, :]  # [B, K, Q]
    h = s - s.exp() + _log_one_minus_exp(log_x).sum(1)  # [B, Q]
    return h.logsumexp(1) + (width[:, 0] * _STEP).log()


def _log_one_minus_exp(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)) of log x, also where x is too small for its exponential to tell it from 0."""
    small = log_x < -12
    safe = torch.where(small, 0.0, log_x)  # so that the branch not taken has a finite gradient
    return torch.where(small, log_x - log_x.clamp_max(0.0).exp() / 2, (-torch.expm1(-safe.clamp_max(80.0).exp())).log())


def _mode(log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """Where h is greatest, and the standard deviation of a normal density with its curvature there; [B, 1] each."""
    low = torch.zeros_like(log_rate[:, :1])
    high = torch.full_like(low, math.log(1.0 + log_rate.shape[1]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rises = 1 - middle.exp() + _phi(log_rate + middle).sum(1, keepdim=True) > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    x = (log_rate + low).clamp_max(4.4).exp()  # as far as phi is told from 0
    phi = _phi(log_rate + low)
    # phi(x) = x / (exp(x) - 1) has x phi'(x) = phi (1 - phi - x).
    curvature = low.exp() - (phi * (1 - phi - x)).sum(1, keepdim=True)
    return low, curvature.clamp_min(1e-6).rsqrt()


def _phi(log_x: Tensor) -> Tensor:
    """x / (exp(x) - 1) of log x, 1 at 0."""
    x = log_x.clamp(-12.0, 4.4).exp()
    return x / torch.expm1(x)


def leave_one_out(reward: Tensor, num_masks: int) -> Tensor:
    """Each mask's reward less the mean of the others', which are drawn apart from it, so that nothing is biased.

    Args:
        reward: [B R], R masks of each clip after each other.
        num_masks: R. For one mask the others are those of the other clips; a single one of a single clip has none,
            and its gradient varies the most.

    Returns:
        [B R].
    """
    groups = reward.view(-1, num_masks) if num_masks > 1 else reward.view(1, -1)
    others = groups.shape[1] - 1
    if not others:
        return reward
    return (groups - (groups.sum(1, keepdim=True) - groups) / others).reshape(-1)
