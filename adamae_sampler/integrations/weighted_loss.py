"""Hosts whose forward_loss is a mean over tokens, weighted by the mask: it also gives the sampling loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.host import AdaptiveHost
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.ops.sampling import LOG_PROB_RANGE


class WeightedLossHost(AdaptiveHost):
    """Base of these hosts. Modifications:

    - forward_loss adds the sampling loss, computed from the errors of the host's own forward_loss.

    A mixin's `probe` calls `check_forward_loss`.
    """

    def of_tokens(self, of_units: Tensor) -> Tensor:
        """[B, units] -> [B, N]: values of what the sampler draws -> values of the tokens whose errors are averaged."""
        return of_units

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, *more: Any, **named: Any) -> Tensor:
        """The host's arguments -> the host's loss, and in training the weighted sampling loss with it."""
        host_loss = super().forward_loss  # type: ignore[misc]
        if self._use is None:  # the method was called by itself
            return host_loss(imgs, pred, mask, *more, **named)
        self._use.check_loss_mask(mask)
        if (valid := self.current.valid) is not None:
            mask = mask * self.of_tokens(valid).view(mask.shape)
        loss: Tensor = host_loss(imgs, pred, mask, *more, **named)

        def sampling(log_probs: Tensor) -> Tensor:
            # The host's loss is sum(e w) / sum(w) for a mask w. With w = -log p on masked tokens it gives L_S.
            weight = -self.of_tokens(log_probs.clamp(*LOG_PROB_RANGE)) * mask
            mean: Tensor = host_loss(imgs, pred.detach(), weight, *more, **named)
            return mean * weight.sum() / mask.sum()

        return self.total(loss, sampling)


def check_forward_loss(model: Any, head: nn.Linear, shape: tuple[int, ...], num_tokens: int) -> None:
    """Raises HostInterfaceError unless forward_loss is the mean of the tokens' errors, weighted by the mask.

    Args:
        model: the unpatched host.
        head: its last layer, which predicts the pixels.
        shape: the shape of its input for one clip.
        num_tokens: N.
    """
    attributes = dict(model.__dict__)  # mae_st's patchify leaves an attribute behind
    try:
        name, predicted = f"forward_loss of {type(model).__name__}", (num_tokens, head.out_features)
        check_weighted_loss(model.forward_loss, name, shape, predicted, head.weight)
    finally:
        model.__dict__.clear()
        model.__dict__.update(attributes)


def check_weighted_loss(
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    name: str,
    shape: tuple[int, ...],
    predicted: tuple[int, int],
    like: Tensor,
) -> None:
    """Raises HostInterfaceError unless a loss is the mean of the tokens' errors, weighted by the mask.

    Args:
        loss_fn: (imgs, pred, mask [1, N]) -> a scalar.
        name: of the loss, for messages.
        shape: the shape of its input for one clip.
        predicted: N, and the values of a token.
        like: a tensor of the model's device and dtype.
    """
    num_tokens, device = predicted[0], like.device
    imgs, pred = (
        torch.arange(math.prod(each), device=device).sin().to(like.dtype).view(each)
        for each in (shape, (1, *predicted))
    )
    first = (torch.arange(num_tokens, device=device) < num_tokens // 2).float()[None]
    second, everywhere = 1 - first, torch.ones_like(first)
    elsewhere = pred + second[..., None].to(pred.dtype)  # another prediction of the tokens that `first` leaves out
    tolerance = 1e-2 if like.dtype.itemsize < 4 else 1e-4
    try:
        with torch.no_grad():
            of_first, of_second, of_all, weighted, with_others = (
                float(loss_fn(imgs, *each))
                for each in (
                    (pred, first), (pred, second), (pred, everywhere), (pred, 3 * first + second), (elsewhere, first)
                )
            )  # fmt: skip
        least = _least_loss(lambda prediction: loss_fn(imgs, prediction, everywhere), pred, tolerance * abs(of_all))
    except Exception as error:  # whatever a host's own code raises
        raise HostInterfaceError(
            f"{name} was expected to take imgs {list(shape)} and pred {list(pred.shape)}, and raised "
            f"{type(error).__name__}: {error}. The model was left as it was."
        ) from error
    shares = 3 * float(first.sum()), float(second.sum())
    mean = (shares[0] * of_first + shares[1] * of_second) / sum(shares)
    for what, found, expected in (
        ("for tokens of unequal weights", weighted, mean),
        ("with other predictions of tokens that are not masked", with_others, of_first),
        ("for the best prediction found", least, 0.0),
    ):
        slack = max(tolerance, _LEAST) if expected == 0 else tolerance
        if not math.isclose(found, expected, rel_tol=tolerance, abs_tol=slack * abs(of_all)):
            raise HostInterfaceError(
                f"{name} was expected to be a mean over tokens weighted by the mask, without other terms, and 0 for a "
                f"perfect prediction. On a trial input it gave {found:.6g} {what}, expected {expected:.6g}, so it "
                "cannot give the sampling loss. Add other terms in forward, or use AdaptiveTokenSampler directly, see "
                "the README. The model was left as it was."
            )


_LEAST = 5e-3  # of the loss; some errors are not quite 0 for a perfect prediction, as sqrt(d^2 + eps)


def _least_loss(loss_of: Callable[[Tensor], Tensor], start: Tensor, enough: float) -> float:
    """The least loss, or one below `enough`, of a loss that falls towards a target of each value."""

    def slope_at(prediction: Tensor) -> Tensor:
        with torch.enable_grad():
            prediction = prediction.detach().requires_grad_()
            return torch.autograd.grad(loss_of(prediction), prediction)[0]

    def at(prediction: Tensor) -> float:
        with torch.no_grad():
            return float(loss_of(prediction))

    # The slope of squared errors is linear, so two slopes give the target.
    slope = slope_at(start)
    change = slope_at(start + 1) - slope
    least = at(start - slope / torch.where(change == 0, 1.0, change))
    if least <= enough:
        return least
    low, high = torch.full_like(start, -1024.0), torch.full_like(start, 1024.0)
    for _ in range(32):  # other errors: by bisection
        middle = (low + high) / 2
        slope = slope_at(middle)
        low, high = torch.where(slope <= 0, middle, low), torch.where(slope >= 0, middle, high)
    return min(least, at((low + high) / 2))
