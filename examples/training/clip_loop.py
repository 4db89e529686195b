"""A short training loop on generated clips, which shows to which tokens p turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adamae_sampler import AdaMAELoss
from adamae_sampler.models import AdaMAE


class Clips(NamedTuple):
    """A batch.

    Attributes:
        pixels: [B, C, T, H, W].
        valid: [B, N] bool, the tokens that count.
        hard: [B, N] bool, the tokens that hold something which the others do not tell.
    """

    pixels: Tensor
    valid: Tensor
    hard: Tensor


def train_on_clips(
    model: AdaMAE, make: Callable[[torch.Generator], Clips], name: str, steps: int, sampling_weight: float
) -> list[float]:
    """Trains on fresh clips; returns p(hard) / p(other valid tokens) of each step.

    Args:
        model: for clips of this size; its sampler learns a p.
        make: source of randomness -> a batch.
        name: what is hard, for the lines that it prints.
        steps: optimiser steps.
        sampling_weight: of `AdaMAELoss`; with 0 the masks stay random.
    """
    size = model.size.patches.patch
    criterion = AdaMAELoss(sampling_weight, patch_size=size[1:], tubelet_size=size[0], normalize=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for step in range(steps):
        pixels, valid, hard = make(generator)
        prediction, sample = model(pixels, valid=valid)
        out = criterion(prediction, pixels, sample)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

        p, others = sample.log_probs.exp() * valid.sum(1, keepdim=True), valid & ~hard  # 1 for an even p
        ratios.append((p[hard].mean() / p[others].mean()).item())
        if step % 20 == 0 or step == steps - 1:
            shown, share = hard[~sample.mask].float().mean(), hard.sum() / valid.sum()
            print(f"step {step}: reconstruction {out.reconstruction:.4f};", end=" ")
            print(f"{shown:.0%} of the visible tokens are {name}, {share:.0%} of all;", end=" ")
            print(f"their p is {ratios[-1]:.1f} times that of others")
    return ratios
