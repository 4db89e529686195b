"""The page and the figure of masking strategies against each other, made of the rows of strategies.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.core.rows import read_rows
from benchmarks.core.tables import Column, source, spread, table
from benchmarks.masking.arms import ARMS, COMPARED, MARGIN, REFERENCE, SECOND_SEEDS
from benchmarks.masking.comparison import (
    Group,
    Run,
    adjusted,
    explored,
    fast_equals_exact,
    few_labels,
    gate,
    groups,
    second,
    seen,
)
from benchmarks.masking.run import ALL, Row, movers
from benchmarks.masking.statistics import ALPHA, Effect

_OTHERS = {"moving_object": "moving or still object, AUC", "velocity": "velocity, rank correlation"}
_COLUMNS = 5  # panels of the figure side by side
_MASKS = {
    "visible_moving": "visible that move",
    "visible_still": "of still objects",
    "error_moving": "error: moving",
    "error_still": "still object",
    "error_ground": "background",
}


def strategies_page(results: Path) -> str:
    """A section for each setting of each file of rows; empty without rows."""
    parts = []
    for path in _files(results):
        rows = read_rows(path, Row)
        found = groups(rows)
        parts += [section(group, path) for group in found]
        if drawn := _drawn(found):
            parts.append(f"![effects over the share of visible tokens that move]({path.stem}_shown.png)")
            if movers(drawn.task):
                parts.append(f"![effects over the size of what moves]({path.stem}.png)")
    if not parts:
        return ""
    about = (
        "Tiny masked autoencoders, pre-trained with each strategy on clips in which one object moves and others stay "
        "still. From frozen features one linear layer reads which tokens move (in a game, which hold the ball); the "
        "score is its AUC, the mean over the sizes of what moves. Differences are paired within the seeds that both "
        "arms have, with 95% intervals of Student's t, not adjusted; they are of one set of clips for the fit and one "
        "for the test. ± is the standard deviation over seeds. Errors are on random masks that are the same for all "
        "arms. What was fixed beforehand: [the question](../masking/README.md), which says what each size of run is."
    )
    return "\n\n".join(["# Masking strategies", about, *parts])


def _files(results: Path) -> list[Path]:
    return sorted(results.glob("strategies_*.csv"), key=lambda path: (len(path.name), path.name))


def section(group: Group, path: Path) -> str:
    """The tables of the runs of one setting, from a file of rows."""
    task = group.task
    seeds = len({seed for runs in group.runs.values() for seed in runs})
    target = "normalised" if task.normalize else "raw"
    what = f"{task.steps} steps, {task.mask_ratio:.0%} masked, {target} targets, learning rate {task.lr:g}"
    title = f"## {task.size}: {what}, {seeds} seed{'s' * (seeds > 1)}"
    rows = [row for runs in group.runs.values() for run in runs.values() for row in run.values()]
    facts = f"`{path.name}`: {source([vars(row) for row in rows])}."
    return "\n\n".join(filter(None, [title, scores_table(group), verdict(group), by_size(group), masks(group), facts]))


def scores_table(group: Group) -> str:
    """The score of each arm, and its difference from random masking."""
    names = [name for name in ARMS if name in group.runs]
    columns: list[Column[str]] = [
        ("arm", lambda name: name),
        ("", lambda name: ARMS[name].about),
        ("seeds", lambda name: str(len(group.runs[name]))),
        ("score", lambda name: spread(group.scores(name), 4)),
        ("less random's", lambda name: "" if name == REFERENCE else interval(group.effect(name))),
    ]
    for name, header in _OTHERS.items():
        columns.append((header, partial(_other, group, name)))
    if any(group.scores(name, few_labels) for name in names):
        columns.append(("64 labelled clips, AUC", lambda name: spread(group.scores(name, few_labels), 4)))
        columns.append(("less random's", partial(_few, group)))
    return table(columns, names)


def _few(group: Group, arm: str) -> str:
    return "" if arm == REFERENCE else interval(group.effect(arm, score=few_labels))


def _other(group: Group, name: str, arm: str) -> str:
    return spread(group.scores(arm, lambda run: getattr(run[ALL], name)), 3)


def interval(effect: Effect | None, digits: int = 4) -> str:
    """A mean with its interval; empty without one."""
    return "" if effect is None else f"{effect.mean:+.{digits}f} ({effect.low:+.{digits}f}, {effect.high:+.{digits}f})"


def verdict(group: Group) -> str:
    """What the intervals say of the gate and of the question, and nothing else."""
    lines = []
    if (found := gate(group)) is not None:
        lines.append(
            f"- Gate: random masking is {found.errors:.1f} standard errors above the untrained encoder, and closes "
            f"{found.closed:.0%} of the distance to the supervised one: {'passed' if found.passed else 'not passed'}."
        )
    p_values, least = adjusted(group), seen(group)
    for arm in COMPARED:
        effect = group.effect(arm)
        if effect is None or len(p_values) < len(COMPARED):
            continue
        clear = p_values[arm] < ALPHA
        said = f"{'better' if effect.mean > 0 else 'worse'} than random masking" if clear else "unresolved"
        lines.append(
            f"- {arm} - random: {interval(effect)}, Holm's p {p_values[arm]:.2g}: {said}. The smallest effect that "
            f"these seeds find with a chance of 80% is {least[arm]:.4f}."
        )
    if (effect := second(group)) is not None:
        said = "unresolved" if not effect.excludes_zero else "better" if effect.mean > 0 else "worse"
        first, last = min(SECOND_SEEDS), max(SECOND_SEEDS)
        each = ", ".join(f"{difference:+.4f}" for difference in group.differences("exact"))
        lines.append(
            f"- The second question: exact - random on seeds {first} to {last} is {interval(effect)}, "
            f"p {effect.p:.2g}, {effect.number} of {len(SECOND_SEEDS)} seeds: {said}. All seeds of the "
            f"table, in order: {each}."
        )
    if (equal := fast_equals_exact(group)) is not None:
        effect, p = equal
        said = "equivalent" if p < ALPHA else "equivalence not shown"
        lines.append(
            f"- fast - exact: {interval(effect)}, a 90% interval as the two one-sided tests have; within ± {MARGIN:g}, "
            f"p {p:.2g}: {said}."
        )
    effects = explored(group)
    for said, arms in (
        ("better than random masking", [arm for arm, effect in effects.items() if effect.low > 0]),
        ("worse", [arm for arm, effect in effects.items() if effect.high < 0]),
        ("unresolved", [arm for arm, effect in effects.items() if not effect.excludes_zero]),
    ):
        if arms:
            lines.append(f"- Exploration, by intervals that are not adjusted, {said}: {', '.join(arms)}.")
    return "\n".join(lines)


def by_size(group: Group) -> str:
    """Random masking's AUC, and the difference of each arm from it, at each size of what moves."""
    arms = [arm for arm in group.arms if arm != REFERENCE and group.effect(arm) is not None]
    if not arms or not movers(group.task):
        return ""
    columns: list[Column[str]] = [
        ("AUC by patches of what moves", lambda arm: f"{arm} - random" if arm != REFERENCE else arm)
    ]
    columns += [(str(size), partial(_at_size, group, size)) for size in movers(group.task)]
    return table(columns, [REFERENCE, *arms])


def _at_size(group: Group, size: int, arm: str) -> str:
    if arm == REFERENCE:
        return f"{statistics.mean(group.scores(arm, partial(auc_at, size))):.3f}"
    return interval(group.effect(arm, score=partial(auc_at, size)), 3)


def auc_at(size: int, run: Run) -> float:
    """AUC of the readout at one size of what moves."""
    return run[size].moving


def masks(group: Group) -> str:
    """What each arm shows, and its errors on the same random masks."""
    arms = [arm for arm in group.arms if any(run[ALL].visible_moving is not None for run in group.runs[arm].values())]
    columns: list[Column[str]] = [("arm", lambda arm: arm)]
    columns += [(header, partial(_mask, group, name)) for name, header in _MASKS.items()]
    return table(columns, arms)


def _mask(group: Group, name: str, arm: str) -> str:
    return spread(group.scores(arm, lambda run: getattr(run[ALL], name)), 3)


def strategies_figures(results: Path) -> dict[str, plt.Figure]:
    """For each file effects over what is shown and over the size of what moves, of its first setting with two arms."""
    found = {}
    for path in _files(results):
        if group := _drawn(groups(read_rows(path, Row))):
            found[f"{path.stem}_shown"] = _over_what_is_shown(group)
            if movers(group.task):
                found[path.stem] = _over_sizes(group)
    return found


def _drawn(found: Sequence[Group]) -> Group | None:
    """The group of the figures."""
    return next((group for group in found if any(map(partial(_compared, group), group.arms))), None)


def _over_what_is_shown(group: Group) -> plt.Figure:
    """The effect of each arm, in the order of the share of its visible tokens that move."""
    arms = sorted((arm for arm in group.arms if arm == REFERENCE or _compared(group, arm)), key=partial(_shown, group))
    figure, axes = plt.subplots(figsize=(7, 0.24 * len(arms) + 1), layout="constrained")
    axes.axvline(0, color="#777777", lw=0.8)
    for place, arm in enumerate(arms):
        if arm == REFERENCE:
            axes.plot(0, place, "o", ms=4, color="#777777")
        elif (effect := group.effect(arm)) is not None:
            error = [[effect.mean - effect.low], [effect.high - effect.mean]]
            axes.errorbar(effect.mean, place, xerr=error, fmt="o", ms=4, lw=1, capsize=2, color="#1f5fa8")
    axes.set_yticks(range(len(arms)), [f"{arm}  {_shown(group, arm):.0%}" for arm in arms])
    axes.tick_params(labelsize=8)
    axes.set(xlabel="AUC less random masking's", ylabel="visible tokens that move")
    axes.set_title(_setting(group), fontsize=9)
    return figure


def _shown(group: Group, arm: str) -> float:
    return statistics.mean(group.scores(arm, lambda run: run[ALL].visible_moving))


def _setting(group: Group) -> str:
    return f"{group.task.steps} steps, {group.task.mask_ratio:.0%} masked, 95% intervals"


def _compared(group: Group, arm: str) -> bool:
    return arm != REFERENCE and group.effect(arm) is not None


def _over_sizes(group: Group) -> plt.Figure:
    """A panel for each arm: its AUC less random masking's over the size of what moves."""
    arms = [arm for arm in group.arms if _compared(group, arm)]
    sizes = movers(group.task)
    columns = min(_COLUMNS, len(arms))
    rows = -(-len(arms) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.2 * columns, 1.6 * rows + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, arm in zip(grid.flat, arms, strict=False):
        effects = [effect for size in sizes if (effect := group.effect(arm, score=partial(auc_at, size)))]
        middle = [effect.mean for effect in effects]
        errors = [[e.mean - e.low for e in effects], [e.high - e.mean for e in effects]]
        axes.axhline(0, color="#777777", lw=0.8)
        axes.errorbar(range(len(sizes)), middle, errors, fmt="o-", ms=3, lw=1, capsize=2, color="#1f5fa8")
        axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
        axes.set_title(f"{arm}, {effects[0].number} seeds", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(arms) :]:
        axes.remove()
    for axes in grid.flat[len(arms) - columns : len(arms)]:
        axes.tick_params(labelbottom=True)  # also where no panel is below
    figure.supxlabel("area of what moves, patches", fontsize=8)
    figure.supylabel("AUC less random masking's", fontsize=8)
    figure.suptitle(_setting(group), fontsize=9)
    return figure
