"""Paired comparisons of arms over seeds: intervals, Holm's correction, equivalence, and what could have been seen.

An arm and its reference have the same seeds, and a seed fixes the initial encoder, the clips and their order. So the
differences within a seed are compared, by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95  # of intervals
ALPHA = 1 - LEVEL
POWER = 0.8  # of the smallest effect


@dataclass(frozen=True)
class Effect:
    """A mean difference over seeds.

    Attributes:
        mean: of the differences.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided, against no difference.
        deviation: standard deviation of the differences.
        number: of the differences.
    """

    mean: float
    low: float
    high: float
    p: float
    deviation: float
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired(differences: Sequence[float], level: float = LEVEL) -> Effect:
    """The effect of differences within seeds.

    Raises:
        ValueError: there are fewer than two differences, or one is not a number.
    """
    values = np.asarray(differences, float)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"differences {list(differences)}, expected two or more finite numbers: one for each seed.")
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    error = deviation / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, len(values) - 1)) if error else float(mean == 0)
    return Effect(mean, mean - half, mean + half, p, deviation, len(values))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of each name: the chance of any false finding among them is at most alpha."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def equivalence(differences: Sequence[float], margin: float) -> float:
    """p of two one-sided tests: small where the mean difference lies within plus or minus the margin.

    Raises:
        ValueError: the margin is not positive, or see `paired`.
    """
    if margin <= 0:
        raise ValueError(f"margin={margin}, expected a positive number in the units of the score.")
    effect = paired(differences)
    error = effect.deviation / math.sqrt(effect.number)
    if not error:
        return float(abs(effect.mean) >= margin)
    return max(
        float(stats.t.sf((effect.mean + margin) / error, effect.number - 1)),
        float(stats.t.cdf((effect.mean - margin) / error, effect.number - 1)),
    )


def smallest_effect(deviation: float, number: int, alpha: float = ALPHA) -> float:
    """The mean difference that a two-sided paired t test finds with a chance of `POWER`.

    Args:
        deviation: standard deviation of a difference.
        number: of seeds.
        alpha: of the test; with Holm's correction, the first step's alpha / number of tests.
    """
    if not deviation:
        return 0.0
    critical = stats.t.ppf(1 - alpha / 2, number - 1)

    def missing(shift: float) -> float:  # power less POWER; the other tail is negligible where power is large
        return float(stats.nct.sf(critical, number - 1, shift)) - POWER

    return float(optimize.brentq(missing, 0.0, 100.0)) * deviation / math.sqrt(number)
