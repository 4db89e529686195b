"""Plots of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from rows import COMPILED, OFFICIAL, OURS, TORCH_BACKEND, Row, of_official

_COLOURS = {OURS: "#1b6ca8", TORCH_BACKEND: "#8fb8d8", OFFICIAL: "#b5533c", COMPILED: "#e0a899"}
_MASKINGS = {"adaptive": "#1b6ca8", "random": "#777777", "tube": "#b5533c", "frame": "#d8a031"}


def draw(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """Draws what there are rows for; the files written, named after the device."""
    figures = {"ops": _ops(rows), "steps": _steps(rows), "sweep": _sweep(rows)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}_{device}.png")
            figure.savefig(written[-1], dpi=120, bbox_inches="tight")
            plt.close(figure)
    return written


def _ops(rows: Sequence[Row]) -> plt.Figure | None:
    """Time of each op over the official code's, every implementation as its caller sees it."""
    ops = [row for row in rows if row.suite == "ops" and row.timing != "graph" and row.implementation in _COLOURS]
    cases = list(dict.fromkeys(row.case for row in ops))
    if not cases:
        return None
    by_name = {case: [row for row in ops if row.case == case] for case in cases}
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(cases) + 1))
    names = [name for name in _COLOURS if name != OFFICIAL and any(row.implementation == name for row in ops)]
    for i, name in enumerate(names):
        ratios = {row.case: of_official(row, by_name[row.case]) for row in ops if row.implementation == name}
        bars = {case: ratio for case, ratio in ratios.items() if ratio is not None}
        places = [cases.index(case) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for case in bars]
        axes.barh(places, bars.values(), 0.8 / len(names), color=_COLOURS[name], label=name)
    axes.axvline(1, color=_COLOURS[OFFICIAL], label=OFFICIAL)
    axes.set(xscale="log", yticks=range(len(cases)), yticklabels=cases, xlabel="time over the official code's")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7)
    return figure


def _steps(rows: Sequence[Row]) -> plt.Figure | None:
    """A step of ViT-B with each masking, in the largest batch that there is, the fastest of ours."""
    steps = [row for row in rows if row.suite == "steps" and "ViT-B" in row.op and row.implementation.startswith(OURS)]
    if not steps:
        return None
    clips, dtype = max((row.clips, row.dtype) for row in steps)
    best: dict[str, float] = {}
    for row in steps:
        if (row.clips, row.dtype) == (clips, dtype):
            kind = row.op.partition(", ")[2]
            best[kind] = min(row.median_s, best.get(kind, row.median_s))
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.bar(list(best), [1e3 * each for each in best.values()], color=[_MASKINGS[kind.split()[0]] for kind in best])
    axes.set(ylabel="ms a step", title=f"Training step of ViT-B, {clips} clips, {dtype}, {steps[0].device}")
    axes.tick_params(axis="x", labelsize=8, rotation=20)
    return figure


def _sweep(rows: Sequence[Row]) -> plt.Figure | None:
    """Speed and memory over clips of a batch, and time of a clip over its tokens."""
    kinds = tuple(f"ViT-B, {masking} 95%" for masking in ("adaptive", "random"))
    ours = [row for row in rows if row.suite in ("sweep", "steps") and row.implementation.startswith(OURS)]
    steps = [row for row in ours if row.op.endswith(kinds)]
    if not any(row.suite == "sweep" for row in steps):
        return None
    shortest = min(row.tokens for row in steps)
    figure, (speed, memory, length) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for masking in ("adaptive", "random"):
        own = [row for row in steps if f", {masking} " in row.op]
        style = {"marker": "o", "color": _MASKINGS[masking], "label": f"{masking} 95%"}
        batches = _fastest(own, lambda row: row.clips if row.tokens == shortest else None)
        speed.plot(list(batches), [row.clips / row.median_s for row in batches.values()], **style)
        memory.plot(list(batches), [(row.peak_bytes or 0) / 1e9 for row in batches.values()], **style)
        lengths = _fastest(own, lambda row: row.tokens)
        length.plot(list(lengths), [1e3 * row.median_s / row.clips for row in lengths.values()], **style)
    speed.set(xscale="log", xlabel="clips of a batch", ylabel="clips/s")
    memory.set(xscale="log", yscale="log", xlabel="clips of a batch", ylabel="peak memory, GB")
    length.set(xscale="log", yscale="log", xlabel="tokens of a clip", ylabel="ms a clip, best batch")
    speed.legend(fontsize=8)
    figure.suptitle(f"Training step of ViT-B, {steps[0].dtype}, {steps[0].device}", fontsize=10)
    return figure


def _fastest(rows: Sequence[Row], key: Callable[[Row], int | None]) -> dict[int, Row]:
    """The row with the least time a clip for each key, in the order of the keys; rows without one are left out."""
    best: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row.median_s / row.clips):
        if (found := key(row)) is not None:
            best.setdefault(found, row)
    return dict(sorted(best.items()))
