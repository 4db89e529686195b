"""stable-pretraining's MAE, whose `masking=` takes a module. Nothing of the library is imported here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.checks import check_sampler
from adamae_sampler.integrations.host import HostShape, LastStep
from adamae_sampler.integrations.mask_use import MaskUse
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.random_masking import visible_first
from adamae_sampler.integrations.token_errors import errors_by_gradient
from adamae_sampler.integrations.weighted_loss import check_weighted_loss
from adamae_sampler.losses import ranking_loss
from adamae_sampler.networks import Network, start_even
from adamae_sampler.ops.sampling import LOG_PROB_RANGE
from adamae_sampler.sampler import AdaptiveTokenSampler, TokenSampler

Model = TypeVar("Model", bound=nn.Module)


class MaskingOutput(NamedTuple):
    """What the library's maskings return, under the same names.

    Attributes:
        visible: [B, K, D].
        mask: [B, N] fp32, 1 = masked.
        ids_restore: [B, N] int64, the place of each token among visible, then masked tokens.
        ids_keep: [B, K] int64, ascending.
    """

    visible: Tensor
    mask: Tensor
    ids_restore: Tensor
    ids_keep: Tensor


class AdaptiveMasking(nn.Module):
    """A masking of the library that follows a sampler: `MAE(name, masking=AdaptiveMasking(sampler))`.

    `adaptive_mae` makes one and adds the sampling loss; without that loss a sampler does not learn.

    Args:
        sampler: any sampler with one mask for each image that needs no pixels.
        sampling_weight: weight of the sampling loss.

    Attributes:
        last_step: the latest mask and losses, see `LastStep`.

    Raises:
        ValueError: the sampler has several masks for each image, draws from pixels, or sets targets aside.
    """

    last_step: LastStep | None = None

    def __init__(self, sampler: TokenSampler, sampling_weight: float = 1e-4) -> None:
        super().__init__()
        targets = getattr(sampler, "target_ratio", 0)
        if sampler.num_masks != 1 or sampler.uses_video or targets:
            raise ValueError(
                f"this {type(sampler).__name__} has num_masks={sampler.num_masks}, uses_video={sampler.uses_video}, "
                f"target_ratio={targets}; expected 1, False and 0: a masking of stable-pretraining gets tokens, gives "
                "one mask for each image, and all masked tokens are decoded."
            )
        self.sampler = sampler
        self.sampling_weight = sampling_weight
        self._use: MaskUse | None = None  # the mask for which no loss was computed yet
        self._replaced: tuple[nn.Module, ...] = ()  # the masking in whose place this one is
        self._valid: Tensor | None = None

    @contextmanager
    def counting(self, valid: Tensor) -> Iterator[None]:
        """Within it, tokens count where `valid` [B, N] bool is True, see `TokenSampler.forward`.

        with model.masking.counting(valid):
            loss = model(images).loss
        """
        self._valid = valid
        try:
            yield
        finally:
            self._valid = None

    def forward(self, x: Tensor, grid_h: int, grid_w: int) -> MaskingOutput:
        """Tokens [B, N, D] of a grid -> its visible tokens and the mask.

        Raises:
            TypeError, ValueError: as `TokenSampler.forward`.
        """
        if self._use is not None and not torch.compiler.is_compiling():
            warnings.warn(
                "a second mask was drawn and no sampling loss computed for the first, so the sampler does not learn. "
                "Call adaptive_mae(model).",
                stacklevel=2,
            )
        more = {} if self._valid is None else {"valid": self._valid}
        sample = self.sampler(x, grid_size=(1, grid_h, grid_w), **more)
        self._use = MaskUse(type(self), "masking", sample, self.sampler.mask_ratio)
        self._use.note_mask()
        self.last_step = LastStep(sample.detach())
        return MaskingOutput(*visible_first(x, self._use), sample.visible_idx)


class SamplingLoss(nn.Module):
    """The loss of a MAE with the sampling loss added, computed from the errors of the MAE's own loss.

    Args:
        loss_fn: the MAE's own, (predictions, images, mask) -> a mean of errors, weighted by the mask.
        masking: the MAE's.
    """

    def __init__(self, loss_fn: nn.Module, masking: AdaptiveMasking) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self._masking = (masking,)  # no submodule: the MAE has it already

    def forward(self, pred: Tensor, imgs: Tensor, mask: Tensor, *more: Any, **named: Any) -> Tensor:
        """The arguments of the MAE's own loss -> that loss plus the weighted sampling loss.

        Raises:
            HostInterfaceError: the mask is not the sampler's latest, or this is its second loss.
        """
        (masking,) = self._masking
        use, masking._use = masking._use, None
        if use is None:
            raise HostInterfaceError(
                "a loss was computed and no mask drawn for it, or a second loss for one mask. Call the MAE as a whole, "
                "for one view at a time."
            )
        use.check_loss_mask(mask)
        sample = use.sample
        mask = mask if sample.valid is None else mask * sample.valid
        loss: Tensor = self.loss_fn(pred, imgs, mask, *more, **named)

        def sampling(log_probs: Tensor) -> Tensor:
            weight = -log_probs.clamp(*LOG_PROB_RANGE) * mask
            mean: Tensor = self.loss_fn(pred.detach(), imgs, weight, *more, **named)
            return mean * weight.sum() / mask.sum()

        if sample.difficulty is not None:
            added = ranking_loss(sample, errors_by_gradient(sampling, sample))
        elif sample.log_probs is not None:
            added = sampling(sample.log_probs)
        else:
            masking.last_step = LastStep(sample.detach(), loss.detach())
            return loss
        masking.last_step = LastStep(sample.detach(), loss.detach(), added.detach())
        return loss + masking.sampling_weight * added


def adaptive_mae(
    model: Model,
    mask_ratio: float | None = None,
    *,
    network: Network | nn.Module = "mha",
    sampler: TokenSampler | None = None,
    sampling_weight: float = 1e-4,
) -> Model:
    """Gives a MAE of stable-pretraining a learned mask, in place of its masking, and the sampling loss.

    Call it before you make the optimizer. Training starts with random masks.

    Args:
        model: `stable_pretraining.methods.MAE`, or a module with its `masking`, `encoder` and `loss_fn`.
        mask_ratio: share of tokens to mask; if None that of its masking.
        network: the score network, see `AdaptiveTokenSampler`. A module keeps the weights it has.
        sampler: a sampler instead of `mask_ratio` and `network`.
        sampling_weight: weight of the sampling loss.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is no such MAE (`HostInterfaceError`), or its loss is no mean weighted by the mask.
        ValueError: the model has a learned mask already, or the sampler is for another grid or width.
    """
    for name, kind in _INTERFACE.items():
        found: Any = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, kind):
            raise HostInterfaceError(
                f"{type(model).__name__}.{name} is a {type(found).__name__}, expected {kind.__name__}, as in "
                "stable_pretraining.methods.MAE. The model was left as it was."
            )
    mae: Any = model
    if isinstance(mae.loss_fn, SamplingLoss):
        raise ValueError("this model has a learned mask already. To exchange it, random_mae(model) first.")
    encoder, head = mae.encoder, mae.encoder.patch_embed.proj
    weight = head.weight
    side, grid = encoder.patch_size_h, (1, encoder.default_grid_h, encoder.default_grid_w)
    given = mae.masking if isinstance(mae.masking, AdaptiveMasking) else None
    shape = HostShape(encoder.embed_dim, grid, getattr(mae.masking, "mask_ratio", None))
    images = (1, head.in_channels, grid[1] * side, grid[2] * encoder.patch_size_w)
    predicted = grid[1] * grid[2], side**2 * head.in_channels
    check_weighted_loss(
        lambda imgs, pred, mask: mae.loss_fn(pred, imgs, mask),
        f"loss_fn of {type(model).__name__}",
        images,
        predicted,
        weight,
    )
    if given is not None:
        if sampler is not None or mask_ratio is not None:
            raise ValueError("the model's masking has a sampler already: give none, and no mask_ratio.")
        sampler = given.sampler
    elif sampler is None:
        ratio = shape.mask_ratio if mask_ratio is None else mask_ratio
        if ratio is None:
            raise ValueError(f"{type(mae.masking).__name__} has no mask_ratio. Give adaptive_mae one, such as 0.75.")
        sampler = AdaptiveTokenSampler(shape.embed_dim, grid, ratio, network)
        if isinstance(network, str):
            start_even(sampler.network)
    elif mask_ratio is not None:
        raise ValueError("a sampler has a mask_ratio already: give one of the two.")
    check_sampler(sampler, shape, type(model).__name__)
    masking = given or AdaptiveMasking(sampler, sampling_weight)
    masking.to(device=weight.device, dtype=weight.dtype).train(model.training)
    masking._replaced = () if given is not None else (mae.masking,)
    mae.masking = encoder.masking = masking
    mae.loss_fn = SamplingLoss(mae.loss_fn, masking)
    return model


def random_mae(model: Model) -> Model:
    """Undoes `adaptive_mae`: the MAE has its own masking and loss again, and no sampler.

    Returns:
        The model itself.

    Raises:
        TypeError: the model has no learned mask.
    """
    mae: Any = model
    if not isinstance(getattr(mae, "loss_fn", None), SamplingLoss):
        raise TypeError(f"this {type(model).__name__} has no learned mask; see adaptive_mae.")
    masking = mae.masking
    if masking._replaced:
        (mae.masking,) = masking._replaced
        mae.encoder.masking = mae.masking
    mae.loss_fn = mae.loss_fn.loss_fn
    return model


_INTERFACE = {
    "masking": nn.Module,
    "loss_fn": nn.Module,
    "encoder.masking": nn.Module,
    "encoder.patch_embed.proj": nn.Conv2d,
    "encoder.embed_dim": int,
    "encoder.default_grid_h": int,
    "encoder.default_grid_w": int,
    "encoder.patch_size_h": int,
    "encoder.patch_size_w": int,
}
