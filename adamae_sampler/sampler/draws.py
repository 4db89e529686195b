"""Uniform draws, and the masked tokens that are decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops import draw_mask

# Scores this far apart are classes: every token of a higher class is shown before any token of a lower one. The noise
# of `draw_mask` lies within [-2.9, 16.7]. With 2^12 classes all scores stay in the range where fp32 resolves the noise.
CLASS_GAP = 32.0


def draw_decoded(sample: MaskSample, num_decoded: int, generator: torch.Generator | None = None) -> MaskSample:
    """Adds `decoded_idx` to a sample: `num_decoded` masked tokens of each row, drawn uniformly.

    All masked tokens are equally likely to be decoded. So the mean error of the decoded tokens is an unbiased estimate
    of the mean error of all masked tokens, for a decoder that sees this many mask tokens.

    Args:
        sample: a mask.
        num_decoded: M', from 1 to M.
        generator: source of randomness.
    """
    num_masked = sample.masked_idx.shape[1]
    if num_decoded == num_masked:
        return sample
    even = torch.zeros(sample.masked_idx.shape, device=sample.masked_idx.device)
    chosen = draw_mask(even, num_decoded, generator=generator).visible_idx  # [B, M'], ascending
    return sample._replace(decoded_idx=sample.masked_idx.gather(1, chosen))


def draw_classes(number: Tensor, num_visible: int, generator: torch.Generator | None) -> MaskSample:
    """Shows the K tokens of the highest numbers; tokens of equal numbers are equally likely.

    Args:
        number: [B, N], whole numbers from 0 to below 2^12.
        num_visible: K.
        generator: source of randomness.

    Returns:
        A sample without log-probabilities, since there is no p to learn.
    """
    return _drawn(number * CLASS_GAP, num_visible, generator)


def draw_uniform(
    tokens: Tensor, num_masks: int, num_units: int, num_visible: int, generator: torch.Generator | None
) -> MaskSample:
    """Shows K of the units of each clip; every set is equally likely.

    Args:
        tokens: [B, N, D], for the number of clips and the device.
        num_masks: R.
        num_units: tokens, or other units of a clip.
        num_visible: K, units to show.
        generator: source of randomness.
    """
    even = torch.zeros(tokens.shape[0] * num_masks, num_units, device=tokens.device)
    return _drawn(even, num_visible, generator)


def _drawn(scores: Tensor, num_visible: int, generator: torch.Generator | None) -> MaskSample:
    drawn = draw_mask(scores, num_visible, generator=generator)
    return MaskSample(drawn.visible_idx, drawn.masked_idx, drawn.mask)


def repeat_rows(x: Tensor, times: int) -> Tensor:
    """[B, ...] -> [B times, ...], clip by clip."""
    return x if times == 1 else x.repeat_interleave(times, 0)
