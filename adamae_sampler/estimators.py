"""The log-probability of a set of tokens drawn without replacement. The exact policy gradient differentiates it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample

_BISECTIONS = 20
# Nodes of the trapezoidal rule, in standard deviations of the integrand from its mode. Left of the mode the integrand
# falls like exp(s) at the slowest; right of it, faster than a normal density. The rule converges like exp(-1/step^2).
_FROM, _TO, _STEP = -18.0, 6.0, 0.5


def set_log_prob(sample: MaskSample) -> Tensor:
    """log P(S), [B]: the log-probability that the first K tokens drawn from p are S, the visible tokens.

    Tokens are drawn one after the other, without replacement (Plackett-Luce); their order within S does not matter. The
    gradient goes to `sample.log_probs`. Tokens that were set aside before the draw (`sample.held_out`) are not drawn.

    Let token i arrive at an exponential time with rate p_i. S is drawn first if all tokens of S arrive before the first
    of the other tokens. That first arrival is exponential with rate W, the sum of the other tokens' p (Kool et al.,
    2020, "Estimating Gradients for Discrete Random Variables by Sampling without Replacement", appendix B). With
    t = exp(s) in units of 1 / W,

        P(S) = integral over s of exp(h(s)),   h(s) = s - exp(s) + sum over S of log(1 - exp(-p_i / W exp(s))).

    The integrand is log-concave. Its mode has exp(s) between 1 and 1 + K. The integral is computed numerically.

    Args:
        sample: a mask with log-probabilities.

    Raises:
        ValueError: the sample has no log-probabilities.
    """
    if sample.log_probs is None:
        raise ValueError(
            "sample.log_probs is None: these masks have no distribution to learn. Use AdaptiveTokenSampler."
        )
    visible = sample.log_probs.gather(1, sample.visible_idx)  # [B, K]
    masked = sample.log_probs.gather(1, sample.masked_idx)
    if sample.held_out is not None:
        masked = masked.where(~sample.held_out.gather(1, sample.masked_idx), -torch.inf)
    others = masked.logsumexp(1, keepdim=True)  # [B, 1], log W
    log_rate = visible - others  # [B, K], of p_i / W
    with torch.no_grad():
        mode, width = _mode(log_rate)  # [B, 1] each
        node = torch.arange(_FROM, _TO + _STEP, _STEP, device=mode.device, dtype=mode.dtype)  # [Q]
        s = mode + width * node  # [B, Q]
    log_x = log_rate[:, :, None] + s[:, None, :]  # [B, K, Q]
    h = s - s.exp() + _log_one_minus_exp(log_x).sum(1)  # [B, Q]
    return h.logsumexp(1) + (width[:, 0] * _STEP).log()


def _log_one_minus_exp(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)), given log x. It stays accurate where x is so small that exp(-x) rounds to 1."""
    small = log_x < -12
    safe = torch.where(small, 0.0, log_x)  # so that the branch not taken has a finite gradient
    return torch.where(small, log_x - log_x.clamp_max(0.0).exp() / 2, (-torch.expm1(-safe.clamp_max(80.0).exp())).log())


def _mode(log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """The maximiser of h, and the standard deviation of a normal density with h's curvature there; [B, 1] each."""
    low = torch.zeros_like(log_rate[:, :1])
    high = torch.full_like(low, math.log(1.0 + log_rate.shape[1]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rises = 1 - middle.exp() + _phi(log_rate + middle).sum(1, keepdim=True) > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    x = (log_rate + low).clamp_max(4.4).exp()  # clamped as in `_phi`: beyond, phi is negligible
    phi = _phi(log_rate + low)
    # phi(x) = x / (exp(x) - 1) has x phi'(x) = phi (1 - phi - x).
    curvature = low.exp() - (phi * (1 - phi - x)).sum(1, keepdim=True)
    return low, curvature.clamp_min(1e-6).rsqrt()


def _phi(log_x: Tensor) -> Tensor:
    """phi(x) = x / (exp(x) - 1), given log x; phi(0) is 1."""
    x = log_x.clamp(-12.0, 4.4).exp()
    return x / torch.expm1(x)


def leave_one_out(reward: Tensor, num_masks: int) -> Tensor:
    """Each mask's reward minus the mean reward of the other masks. Masks are drawn independently, so no bias arises.

    Args:
        reward: [B R], one value for each mask, clip by clip.
        num_masks: R. If R > 1, the other masks are those of the same clip. If R = 1, they are those of the other clips.
            A single mask of a single clip has no others: its reward stays as it is, and its gradient varies the most.

    Returns:
        [B R].
    """
    groups = reward.view(-1, num_masks) if num_masks > 1 else reward.view(1, -1)
    others = groups.shape[1] - 1
    if not others:
        return reward
    return (groups - (groups.sum(1, keepdim=True) - groups) / others).reshape(-1)
