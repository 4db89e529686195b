"""What an arm minimises: the loss of the library, and tries at other rewards for the learned sampler.

An objective is made from a model and a criterion, and takes a batch of video. The paper rewards a token's probability
with its error. A reward of another kind takes the place of that error in `sampling_loss`; nothing else changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from adamae_sampler import AdaMAELoss, reconstruction_error, sampling_loss
from adamae_sampler.models import AdaMAE
from adamae_sampler.ops.patches import cut_patches
from benchmarks.masking.train import Loss

Objective = Callable[[AdaMAE, AdaMAELoss], Loss]
_SLOW = 0.01  # of the weights that a slow copy takes over in each step


def plain(model: AdaMAE, criterion: AdaMAELoss) -> Loss:
    """The criterion as it is."""

    def loss(video: Tensor) -> Tensor:
        prediction, sample = model(video)
        return criterion(prediction, video, sample).loss

    return loss


def rewarded(reward: Callable[[Tensor], Tensor]) -> Objective:
    """The paper's loss, with a function of the errors [B, M] of a clip's masked tokens in their place."""

    def objective(model: AdaMAE, criterion: AdaMAELoss) -> Loss:
        def loss(video: Tensor) -> Tensor:
            prediction, sample = model(video)
            out = criterion(prediction, video, sample)
            sampling = sampling_loss(sample, reward(out.token_error.detach()))
            return out.reconstruction + criterion.sampling_weight * sampling

        return loss

    return objective


def standardised(error: Tensor) -> Tensor:
    """Less the mean, over the deviation, of a clip's masked tokens."""
    return (error - error.mean(1, keepdim=True)) / (error.std(1, keepdim=True) + 1e-6)


def ranked(error: Tensor) -> Tensor:
    """0 for the smallest error of a clip's masked tokens, 1 for the largest."""
    return error.argsort(1).argsort(1) / (error.shape[1] - 1)


def sharpened(error: Tensor) -> Tensor:
    """The fourth power."""
    return error**4


def inverted(error: Tensor) -> Tensor:
    """One over the error: shows what is easy, and hides what is hard."""
    return 1 / error.clamp_min(1e-3)


def contrast(model: AdaMAE, criterion: AdaMAELoss) -> Loss:
    """Rewards a normalised error times the variance of its patch.

    In grey video, this is the error in raw pixels of a prediction that is given each patch's mean and deviation.
    """

    def loss(video: Tensor) -> Tensor:
        prediction, sample = model(video)
        out = criterion(prediction, video, sample)
        variance = cut_patches(video / 255, criterion.patches).var(-1).gather(1, sample.target_idx)
        sampling = sampling_loss(sample, out.token_error.detach() * variance)
        return out.reconstruction + criterion.sampling_weight * sampling

    return loss


def reducible(model: AdaMAE, criterion: AdaMAELoss) -> Loss:
    """Rewards what was learned lately: the error of a slow copy of the model on the same mask, less the model's own.

    Standardised within a clip. Where nothing can be learned, the difference is noise around zero, and so is the reward.
    """
    slow = copy.deepcopy(model).requires_grad_(False)

    def loss(video: Tensor) -> Tensor:
        prediction, sample = model(video)
        out = criterion(prediction, video, sample)
        with torch.no_grad():
            for theirs, mine in zip(slow.parameters(), model.parameters(), strict=True):
                theirs.lerp_(mine, _SLOW)
            before = reconstruction_error(
                slow(video, mask=sample)[0],
                video,
                sample,
                normalize=criterion.patches.normalize,
                patch_size=criterion.patches.patch[1:],
                tubelet_size=criterion.patches.patch[0],
            )
            reward = standardised(before - out.token_error)
        return out.reconstruction + criterion.sampling_weight * sampling_loss(sample, reward)

    return loss


def of_targets(model: AdaMAE, criterion: AdaMAELoss) -> Loss:
    """The policy gradient of the error over tokens that `TargetSetSampler` never shows, whatever else a mask hides."""

    def loss(video: Tensor) -> Tensor:
        prediction, sample = model(video)
        out = criterion(prediction, video, sample)
        assert sample.log_probs is not None
        target = sample.log_probs.detach().gather(1, sample.target_idx).isneginf()
        # The mean over all tokens of this is the mean error of the targets.
        error = out.token_error.detach() * target * (target.shape[1] / target.sum(1, keepdim=True))
        return out.reconstruction + sampling_loss(sample, error, estimator="plackett_luce")

    return loss
