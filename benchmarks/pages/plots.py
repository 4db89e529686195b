"""Plots of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.core.rows import OURS, Row, read_rows
from benchmarks.pages.strategies import strategies_figures
from benchmarks.stages.gpu_run import GpuRun
from benchmarks.steps.options import PART

_MASKINGS = {"adaptive": "#1b6ca8", "random": "#777777"}
_PARTS = {  # label and colour
    "encoder": ("ViT-B's encoder, 5% of the tokens", "#777777"),
    "exact": ("exact sampler", "#b5533c"),
    "pooled": ("pooled sampler, from tokens", "#8fb8d8"),
    "pixels": ("pooled sampler, from pixels", "#1b6ca8"),
}


def draw(folder: Path, runs: Sequence[GpuRun]) -> list[Path]:
    """Draws the rows of a folder; the files written."""
    figures = {f"sweep_{run.slug}": _sweep([*run.of("sweep"), *run.of("steps")]) for run in runs}
    figures["options_cpu"] = _parts(read_rows(folder / "options_cpu.csv", Row))
    figures |= strategies_figures(folder)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
    return written


def _parts(rows: Sequence[Row]) -> plt.Figure | None:
    """Seconds of the samplers and of the encoder over the tokens of a clip."""
    parts = [row for row in rows if row.op == PART]
    if not parts:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, (label, colour) in _PARTS.items():
        mine = [row for row in parts if row.implementation == name]
        axes.plot([row.tokens for row in mine], [row.median_s for row in mine], "o-", color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a clip", ylabel="seconds, forward and backward")
    _name_ticks(axes, [row.tokens for row in parts])
    axes.legend(fontsize=8)
    axes.set_title(parts[0].device, fontsize=9)
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
    for masking, colour in _MASKINGS.items():
        own = [row for row in steps if f", {masking} " in row.op]
        style = {"marker": "o", "color": colour, "label": f"{masking} 95%"}
        batches = _fastest(own, lambda row: row.clips if row.tokens == shortest else None)
        speed.plot(list(batches), [row.clips / row.median_s for row in batches.values()], **style)
        memory.plot(list(batches), [(row.peak_bytes or 0) / 1e9 for row in batches.values()], **style)
        lengths = _fastest(own, lambda row: row.tokens)
        length.plot(list(lengths), [1e3 * row.median_s / row.clips for row in lengths.values()], **style)
    speed.set(xscale="log", xlabel="clips of a batch", ylabel="clips/s")
    memory.set(xscale="log", yscale="log", xlabel="clips of a batch", ylabel="peak memory, GB")
    length.set(xscale="log", yscale="log", xlabel="tokens of a clip", ylabel="ms a clip, best batch")
    _name_ticks(length, [row.tokens for row in steps])
    speed.legend(fontsize=8)
    figure.suptitle(f"Training step of ViT-B, {steps[0].dtype}, {steps[0].device}", fontsize=10)
    return figure


def _name_ticks(axes: plt.Axes, numbers: Iterable[int]) -> None:
    axes.set_xticks(sorted(set(numbers)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _fastest(rows: Sequence[Row], key: Callable[[Row], int | None]) -> dict[int, Row]:
    """The row with the least time a clip for each key, in the order of the keys; rows without one are left out."""
    best: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row.median_s / row.clips):
        if (found := key(row)) is not None:
            best.setdefault(found, row)
    return dict(sorted(best.items()))
