"""Rows of runs to effects: the primary endpoint, its differences within seeds, the gate, and the equivalence."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.masking.arms import (
    ARMS,
    ASKED,
    COMPARED,
    MARGIN,
    REFERENCE,
    SECOND_SEEDS,
    SETTINGS,
    SUPERVISED,
    UNTRAINED,
)
from benchmarks.masking.run import ALL, Row, Task, finished, movers
from benchmarks.masking.statistics import ALPHA, Effect, equivalence, holm, paired, smallest_effect

Run = Mapping[int, Row]  # the rows of a run, by size of what moves
Score = Callable[[Run], float | None]


def primary(run: Run) -> float:
    """The primary endpoint: AUC of "this token belongs to what moves", the mean over the sizes of what moves.

    Where sizes are not known, it is that over all clips.
    """
    return statistics.mean(row.moving for row in _scored(run))


def few_labels(run: Run) -> float | None:
    """The same AUC of the encoder fine-tuned on few labelled clips; None where that was not measured."""
    found = [row.few_labels for row in _scored(run) if row.few_labels is not None]
    return statistics.mean(found) if found else None


def _scored(run: Run) -> list[Row]:
    """The rows that a score is the mean of."""
    return [run[mover] for mover in movers(run[ALL]) or (ALL,)]


@dataclass(frozen=True)
class Group:
    """Runs that differ in arm and seed alone.

    Attributes:
        task: of the first run.
        runs: by arm, then by seed.
    """

    task: Task
    runs: Mapping[str, Mapping[int, Run]]

    @property
    def of_question(self) -> bool:
        """Whether these are runs of the question, and not of the exploration."""
        return self.task.normalize and self._as_asked(self.task.steps)

    @property
    def of_second_question(self) -> bool:
        """Whether these are runs of the second question: the same with raw targets, then at twice the length too."""
        return not self.task.normalize and (self._as_asked(self.task.steps) or self._as_asked(self.task.steps / 2))

    def _as_asked(self, steps: float) -> bool:
        """Whether the setting is the question's, with these steps and any target."""
        asked = SETTINGS[self.task.size]
        mine = (steps, self.task.lr, self.task.mask_ratio)
        return self.task.size in ASKED and mine == (asked.steps, asked.lr, asked.mask_ratio)

    @property
    def arms(self) -> list[str]:
        """The arms that were trained without labels, in the order of ARMS."""
        return [name for name in ARMS if name in self.runs and name not in (UNTRAINED, SUPERVISED)]

    def scores(self, arm: str, score: Score = primary) -> list[float]:
        """Of every seed for which it was measured."""
        found = (score(run) for _, run in sorted(self.runs.get(arm, {}).items()))
        return [value for value in found if value is not None]

    def differences(self, arm: str, reference: str = REFERENCE, score: Score = primary) -> list[float]:
        """Arm less reference, of every seed for which both were measured."""
        mine, theirs = self.runs.get(arm, {}), self.runs.get(reference, {})
        pairs = [(score(mine[seed]), score(theirs[seed])) for seed in sorted(set(mine) & set(theirs))]
        return [one - other for one, other in pairs if one is not None and other is not None]

    def effect(self, arm: str, reference: str = REFERENCE, score: Score = primary) -> Effect | None:
        """The paired effect; None without two seeds that both have."""
        found = self.differences(arm, reference, score)
        return paired(found) if len(found) > 1 else None


def groups(rows: Iterable[Row]) -> list[Group]:
    """The finished runs, those with the same setting together.

    Raises:
        ValueError: a row is of an arm that is not in ARMS.
    """
    found: dict[tuple[object, ...], dict[str, dict[int, Run]]] = {}
    firsts: dict[tuple[object, ...], Task] = {}
    for task, run in finished(rows).items():
        if task.arm not in ARMS:
            raise ValueError(f"a row of arm {task.arm!r}, which benchmarks/masking/arms.py does not have.")
        shared = (task.size, task.steps, task.lr, task.mask_ratio, task.normalize)
        firsts.setdefault(shared, task)
        found.setdefault(shared, {}).setdefault(task.arm, {})[task.seed] = run
    return [Group(firsts[shared], by_arm) for shared, by_arm in found.items()]


@dataclass(frozen=True)
class Gate:
    """Whether pre-training helps at all: random masking beside an untrained and a supervised encoder.

    Attributes:
        errors: the gain over the untrained encoder, in its standard errors.
        closed: the share of the distance from untrained to supervised that it closes.
    """

    errors: float
    closed: float

    @property
    def passed(self) -> bool:
        """Five standard errors, and a fifth of the distance."""
        return self.errors >= 5 and self.closed >= 0.2


def gate(group: Group) -> Gate | None:
    """None without seeds of all three."""
    gain = group.effect(REFERENCE, UNTRAINED)
    supervised = group.scores(SUPERVISED)
    if gain is None or not supervised:
        return None
    untrained = statistics.mean(group.scores(UNTRAINED))
    error = gain.deviation / gain.number**0.5
    return Gate(gain.mean / error, gain.mean / (statistics.mean(supervised) - untrained))


def adjusted(group: Group) -> dict[str, float]:
    """Holm's p of the comparisons that the question names, of those that have been run; none in the exploration."""
    if not group.of_question:
        return {}
    found = {arm: effect.p for arm in COMPARED if (effect := group.effect(arm)) is not None}
    return holm(found)


def second(group: Group) -> Effect | None:
    """The effect that the second question asks for, of its seeds alone; None before two of them have been run."""
    if not group.of_second_question:
        return None
    mine = {arm: {seed: runs[seed] for seed in SECOND_SEEDS if seed in runs} for arm, runs in group.runs.items()}
    return Group(group.task, mine).effect("exact")


def seen(group: Group) -> dict[str, float]:
    """The smallest effect of each comparison that the question's first test would find with a chance of 80%."""
    effects = {arm: group.effect(arm) for arm in COMPARED}
    return {
        arm: smallest_effect(effect.deviation, effect.number, ALPHA / len(COMPARED))
        for arm, effect in effects.items()
        if effect is not None
    }


def explored(group: Group) -> dict[str, Effect]:
    """The effect of every arm that no question of these runs names."""
    asked = {REFERENCE, *(COMPARED if group.of_question else ()), *(("exact",) if second(group) else ())}
    effects = {arm: group.effect(arm) for arm in group.arms if arm not in asked}
    return {arm: effect for arm, effect in effects.items() if effect is not None}


def fast_equals_exact(group: Group) -> tuple[Effect, float] | None:
    """Fast less exact, and p of "they differ by less than the margin"; None without two seeds of both, and in
    the exploration.

    The interval is that of the two one-sided tests: it lies within the margin where p is below 5%.
    """
    if not group.of_question:
        return None
    found: Sequence[float] = group.differences("fast", "exact")
    return (paired(found, 1 - 2 * ALPHA), equivalence(found, MARGIN)) if len(found) > 1 else None
