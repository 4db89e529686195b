"""Uniform draws, and the masked tokens that are decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample, check_valid, require, target_valid
from adamae_sampler.ops import draw_mask
from adamae_sampler.ops.draw import token_log_probs

# Scores this far apart are classes: every token of a higher class is shown before any token of a lower one. The noise
# of `draw_mask` lies within [-2.9, 16.7]. With 2^12 classes all scores stay in the range where fp32 resolves the noise.
CLASS_GAP = 32.0


def draw_decoded(sample: MaskSample, num_decoded: int, generator: torch.Generator | None = None) -> MaskSample:
    """Adds `decoded_idx` to a sample: `num_decoded` masked tokens of each row, drawn uniformly.

    All valid masked tokens are equally likely to be decoded. So the mean error of the decoded tokens is an unbiased
    estimate of the mean error of all masked tokens, for a decoder that sees this many mask tokens.

    Args:
        sample: a mask.
        num_decoded: M', from 1 to M.
        generator: source of randomness.
    """
    num_masked = sample.masked_idx.shape[1]
    if num_decoded == num_masked:
        return sample
    even = torch.zeros(sample.masked_idx.shape, device=sample.masked_idx.device)
    # Of a row with fewer valid masked tokens than are decoded, all are, and the losses leave the others out.
    chosen = draw_valid(even, num_decoded, generator, target_valid(sample)).visible_idx  # [B, M'], ascending
    return sample.replace(decoded_idx=sample.masked_idx.gather(1, chosen))


def draw_valid(scores: Tensor, num_visible: int, generator: torch.Generator | None, valid: Tensor | None) -> MaskSample:
    """`draw_mask` among the valid tokens of each row, if it has so many. Others have p = 0 and come last.

    Args:
        scores: [B, N].
        num_visible: K.
        generator: source of randomness.
        valid: [B, N] bool, where scores may have several rows for each clip; None if all are.
    """
    rows = rows_of(valid, scores)
    if rows is None:
        return draw_mask(scores, num_visible, generator=generator)
    return _draw_among(rows, scores, num_visible, generator).replace(**_distribution(scores, rows))


def draw_beside_targets(
    scores: Tensor,
    num_visible: int,
    num_targets: int,
    num_masks: int,
    generator: torch.Generator | None,
    valid: Tensor | None,
) -> MaskSample:
    """Sets random targets of each clip aside, then draws among its other tokens. The targets alone are decoded.

    All masks of a clip have the same targets. `log_probs` are those of all valid tokens, targets too.

    Args:
        scores: [B R, N].
        num_visible: K.
        num_targets: tokens of a clip to set aside; K + num_targets < N.
        num_masks: R, masks of each clip.
        generator: source of randomness.
        valid: [B, N] bool, the tokens that count; None if all do.

    Raises:
        ValueError: a clip has fewer than K + num_targets + 1 valid tokens.
    """
    if valid is not None:
        count = valid.sum(1)
        require(
            count > num_visible + num_targets,
            lambda row: (
                f"row {row} of valid has {int(count[row])} valid tokens of {valid.shape[1]}, expected at least "
                f"{num_visible + num_targets + 1}: {num_visible} are shown, {num_targets} are targets, and one more is "
                "masked. Leave such clips out of the batch, or lower target_ratio."
            ),
            "a row of valid has too few valid tokens beside its targets",
        )
    even = torch.zeros(scores.shape[0] // num_masks, scores.shape[1], device=scores.device)
    targets = _drawn(even, num_targets, generator, valid)
    held_out = repeat_rows(~targets.mask, num_masks)
    rows = rows_of(valid, scores)
    drawn = _draw_among(~held_out if rows is None else rows & ~held_out, scores, num_visible, generator)
    decoded = repeat_rows(targets.visible_idx, num_masks)
    return drawn.replace(**_distribution(scores, rows), decoded_idx=decoded, held_out=held_out)


def _draw_among(allowed: Tensor, scores: Tensor, num_visible: int, generator: torch.Generator | None) -> MaskSample:
    """The mask of a draw among the allowed tokens."""
    lowest = torch.finfo(scores.dtype).min  # an allowed token whose score is NaN or -inf still comes before others
    ranked = scores.detach().nan_to_num(lowest, torch.inf, lowest).where(allowed, -torch.inf)
    return draw_mask(ranked, num_visible, generator=generator)


def _distribution(scores: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    """The fields of a sample that say from which p it was drawn."""
    if valid is None:
        log_probs, num_nonfinite = token_log_probs(scores)
        return {"log_probs": log_probs, "num_nonfinite": num_nonfinite}
    log_probs, num_nonfinite = token_log_probs(scores.where(valid, -torch.inf))
    return {"log_probs": log_probs, "num_nonfinite": num_nonfinite - (~valid).sum(1)}


def draw_classes(
    number: Tensor, num_visible: int, generator: torch.Generator | None, valid: Tensor | None = None
) -> MaskSample:
    """Shows the K tokens of the highest numbers; tokens of equal numbers are equally likely.

    Args:
        number: [B, N], whole numbers from 0 to below 2^12.
        num_visible: K.
        generator: source of randomness.
        valid: [B, N] bool, the tokens that can be shown; None if all can. See `draw_valid`.

    Returns:
        A sample without log-probabilities, since there is no p to learn.
    """
    return _drawn(number * CLASS_GAP, num_visible, generator, valid)


def draw_uniform(
    tokens: Tensor,
    num_masks: int,
    num_units: int,
    num_visible: int,
    generator: torch.Generator | None,
    valid: Tensor | None = None,
) -> MaskSample:
    """Shows K of the units of each clip; every set is equally likely.

    Args:
        tokens: [B, N, D], for the number of clips and the device.
        num_masks: R.
        num_units: tokens, or other units of a clip.
        num_visible: K, units to show.
        generator: source of randomness.
        valid: [B, units] bool, the units that can be shown; None if all can.
    """
    even = torch.zeros(tokens.shape[0] * num_masks, num_units, device=tokens.device)
    return _drawn(even, num_visible, generator, valid)


def whole_units(valid: Tensor | None, grid: tuple[int, int], axis: int, num_visible: int, name: str) -> Tensor | None:
    """[B, N] -> [B, units] bool: the units all of whose tokens are valid. None if all are.

    Args:
        valid: [B, N] bool, or None.
        grid: (T, H W).
        axis: the axis within a unit: 1 for spatial positions, 2 for time steps.
        num_visible: units to show.
        name: what a unit is, for messages.

    Raises:
        ValueError: a clip has too few such units.
    """
    if valid is None:
        return None
    whole = valid.unflatten(1, grid).all(axis)
    check_valid(whole, num_visible, name)
    return whole


def _drawn(scores: Tensor, num_visible: int, generator: torch.Generator | None, valid: Tensor | None) -> MaskSample:
    rows = rows_of(valid, scores)
    drawn = draw_mask(scores if rows is None else scores.where(rows, -torch.inf), num_visible, generator=generator)
    return MaskSample(drawn.visible_idx, drawn.masked_idx, drawn.mask)


def repeat_rows(x: Tensor, times: int) -> Tensor:
    """[B, ...] -> [B times, ...], clip by clip."""
    return x if times == 1 else x.repeat_interleave(times, 0)


def rows_of(valid: Tensor | None, rows: Tensor) -> Tensor | None:
    """[B, N] for each clip -> [B R, N] for each of the rows; None stays None."""
    return None if valid is None else repeat_rows(valid, rows.shape[0] // max(valid.shape[0], 1))
