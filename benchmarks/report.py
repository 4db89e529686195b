"""Makes tables and plots of the rows that run.py wrote, and of nothing else: no row, no figure.

    python benchmarks/report.py                     # into README.md, between its two "benchmarks" markers
    python benchmarks/report.py --readme copy.md

The plots go beside the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import plots
import tyro
from host_steps import PATCHED, UNPATCHED
from official_repository import ADAMAE, VIDEOMAE
from options_cost import SCALE, options_table, scale_table
from options_cost import Row as OptionRow
from rows import (
    COMPILED,
    OFFICIAL,
    OURS,
    PRODUCTS,
    RESULTS,
    TORCH_BACKEND,
    Row,
    find,
    format_seconds,
    read_rows,
    read_texts,
)
from study_tables import study_facts, study_table, study_title

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HOSTS_BEGIN, HOSTS_END = "<!-- hosts: begin -->", "<!-- hosts: end -->"
OPTIONS = "<!-- options: begin -->", "<!-- options: end -->"
STUDY = "<!-- study: begin -->", "<!-- study: end -->"

_SSV2_CLIPS = 168_913
_PAPER_EPOCH_S = {"adaptive 95%": 9 * 60 + 11, "tube 90%": 9 * 60 + 49}  # on 8 GPUs; supplement, Table 4
_TIMES = (  # columns of times: header, implementation, whether by graph replay
    ("ours", OURS, False),
    ("ours, CUDA graph", OURS, True),
    ("ours, compiled", f"{OURS} compiled", False),
    ("torch backend, CUDA graph", TORCH_BACKEND, True),
    ("official", OFFICIAL, False),
    ("official, compiled", COMPILED, False),
    (ADAMAE, ADAMAE, False),
    (VIDEOMAE, VIDEOMAE, False),
    (PRODUCTS, PRODUCTS, True),
    (PRODUCTS, PRODUCTS, False),
)

Case = Sequence[Row]  # the rows of one case
Column = tuple[str, Callable[[Case], str]]


@dataclass(frozen=True)
class Options:
    """What is read and written."""

    readme: Path = Path(__file__).parent.parent / "README.md"
    """The file that gets the tables."""
    results: Path = RESULTS
    """Folder of the rows, which gets the plots."""


def main(options: Options) -> None:
    """Writes plots and tables."""
    devices = read_devices(options.results)
    text = insert(options.readme.read_text(encoding="utf-8"), markdown(devices), options.readme, (BEGIN, END))
    hosts = [row for rows in devices.values() for row in rows if row.suite == "hosts"]
    if hosts:
        text = insert(text, patched_hosts(hosts), options.readme, (HOSTS_BEGIN, HOSTS_END))
    for markers, tables in ((OPTIONS, options_tables), (STUDY, study_tables)):
        if found := tables(options.results):
            text = insert(text, found, options.readme, markers)
    for device, rows in devices.items():
        for picture in plots.draw(rows, options.results, device):
            print(f"wrote {picture}")
    options.readme.write_text(text, encoding="utf-8")
    print(f"wrote the tables in {options.readme}")


def read_devices(folder: Path) -> dict[str, list[Row]]:
    """The rows of each device, by the device's name in the files', GPUs first.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, list[Row]] = {}
    for suite in ("steps", "sweep", "ops", "hosts"):
        for file in sorted(folder.glob(f"{suite}_*.csv")):
            rows = read_rows(file, Row)
            if rows:
                found.setdefault(file.stem.removeprefix(f"{suite}_"), []).extend(rows)
    if not found:
        raise ValueError(f"{folder} has no rows of benchmarks/run.py; run it first.")
    return dict(sorted(found.items(), key=lambda item: item[0] == "cpu"))


def insert(text: str, tables: str, path: Path, markers: tuple[str, str]) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: it does not hold each marker once, in their order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, once each: the tables go between them.")
    return f"{text.partition(begin)[0]}{begin}\n\n{tables}\n\n{end}{text.partition(end)[2]}"


def markdown(devices: dict[str, list[Row]]) -> str:
    """The tables of all devices."""
    parts: list[str] = []
    for device, each in devices.items():
        rows = [row for row in each if row.suite != "hosts"]
        if not rows:
            continue
        steps = [row for row in rows if row.suite == "steps"]
        parts += [heading(device, rows), comparison(steps, "Training step")]
        parts += [epochs(steps), sweep(rows)] if device != "cpu" else []
        for suite in ("ops", "sweep"):
            ops = [row for row in rows if row.suite == suite and row.direction != "step"]
            parts.append(comparison(ops, "Op" if suite == "ops" else "Op, over the tokens of a clip"))
    return "\n\n".join(filter(None, parts))


def options_tables(results: Path) -> str:
    """What the options cost, on each device that there are rows of options_cost.py from; empty without."""
    parts = []
    for path in sorted(results.glob("options_*.csv"), reverse=True):
        rows = read_rows(path, OptionRow)
        first = rows[0]
        facts = f"{first.device}, torch {first.torch}, {first.threads} threads, commit {first.commit}; `{path.name}`."
        parts += [options_table([row for row in rows if row.group != SCALE]), scale_table(rows), facts]
    return "\n\n".join(parts)


def study_tables(results: Path) -> str:
    """A table for each file of rows of study.py, under its settings; empty without."""
    parts = []
    for path in sorted(results.glob("study*.csv"), key=lambda path: (len(path.name), path.name)):
        rows = read_texts(path)
        parts += [f"**{study_title(rows)}**", study_table(rows), study_facts(rows, path)]
    return "\n\n".join(parts)


def patched_hosts(rows: Sequence[Row]) -> str:
    """A line for each host: its training step unpatched and patched."""
    columns: list[Column] = [
        ("A training step", lambda case: case[0].case),
        ("visible of", lambda case: f"{case[0].visible} of {case[0].tokens}"),
        (UNPATCHED, lambda case: _seconds(find(case, UNPATCHED))),
        (PATCHED, lambda case: _seconds(find(case, PATCHED))),
        ("ratio", _ratio_of_patched),
    ]
    first = rows[0]
    facts = f"{first.device}, torch {first.torch}, {first.threads} threads, fp32; medians, commit {first.commit}."
    hosts = [list(case) for _, case in groupby(sorted_by_case(rows), key=lambda row: row.case)]
    return f"{table(columns, hosts)}\n\n{facts}"


def _ratio_of_patched(case: Case) -> str:
    patched, unpatched = find(case, PATCHED), find(case, UNPATCHED)
    return f"{patched.median_s / unpatched.median_s:.2f}" if patched and unpatched else ""


def heading(device: str, rows: Sequence[Row]) -> str:
    """The device, and what ran on it."""
    facts = dict.fromkeys(
        f"torch {row.torch}, " + (f"{row.threads} threads" if device == "cpu" else f"triton {row.triton}")
        for row in rows
    )
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    return f"### {rows[0].device}\n\n{'; '.join(facts)}; commit {commits}. Medians."


def comparison(rows: Sequence[Row], title: str) -> str:
    """A line for each case, a column for each implementation that was timed; empty without rows."""
    columns: list[Column] = [(title, lambda case: case[0].case)]
    columns += [(header, _time_of(implementation, graph)) for header, implementation, graph in _TIMES]
    columns += [
        ("ours / official", lambda case: _number(find(case, OURS), "of_official", "{:.2f}")),
        ("ours, of a copy's pace", lambda case: _number(_fastest(case), "fraction_of_copy", "{:.0%}")),
        ("ours, peak", lambda case: _memory(find(case, OURS))),
        ("official, peak", lambda case: _memory(find(case, OFFICIAL))),
    ]
    if any(row.direction == "step" for row in rows):
        columns.append(("ours, clips/s", lambda case: _rate(_fastest(case))))
    return table(columns, [list(case) for _, case in groupby(sorted_by_case(rows), key=lambda row: row.case)])


def sorted_by_case(rows: Sequence[Row]) -> list[Row]:
    """The rows of each case together, cases in their first row's order."""
    order = list(dict.fromkeys(row.case for row in rows))
    return sorted(rows, key=lambda row: order.index(row.case))


def epochs(steps: Sequence[Row]) -> str:
    """The paper's Table 4: an epoch of SSv2 with adaptive masking at 95% beside tube masking at 90%."""
    found = {
        kind: {
            (row.clips, row.implementation, row.timing): row
            for row in steps
            if row.op == f"training step of ViT-B, {kind}" and row.implementation.startswith(OURS)
        }
        for kind in _PAPER_EPOCH_S
    }
    adaptive, tube = found.values()
    both = [key for key in adaptive if key in tube]
    if not both:
        return ""
    best = max(both, key=lambda key: adaptive[key].clips_per_s or 0)
    seconds = [_SSV2_CLIPS * row.median_s / row.clips for row in (adaptive[best], tube[best])]
    lines = [
        "| An epoch of SSv2, 168,913 clips | adaptive 95% | tube 90% | ratio |",
        "|---|---|---|---|",
        f"| ours, one {adaptive[best].device}, training steps alone, {best[0]} clips each | "
        f"{_minutes(seconds[0])} | {_minutes(seconds[1])} | {seconds[0] / seconds[1]:.3f} |",
        "| the paper, 8 GPUs, data loading included | "
        + " | ".join(_minutes(each) for each in _PAPER_EPOCH_S.values())
        + f" | {_PAPER_EPOCH_S['adaptive 95%'] / _PAPER_EPOCH_S['tube 90%']:.3f} |",
    ]
    return "\n".join(lines)


def sweep(rows: Sequence[Row]) -> str:
    """Adaptive beside random masking, over clips of a batch and tokens of a clip."""
    steps = [row for row in rows if row.suite == "sweep" and row.direction == "step"]
    sizes = dict.fromkeys((row.clips, row.tokens) for row in steps)
    columns: list[Column] = [
        ("Clips x tokens", lambda case: f"{case[0].clips} x {case[0].tokens}"),
        ("adaptive 95%", lambda case: _seconds(_fastest(_masked(case, "adaptive")))),
        ("random 95%", lambda case: _seconds(_fastest(_masked(case, "random")))),
        ("clips/s, adaptive", lambda case: _rate(_fastest(_masked(case, "adaptive")))),
        ("peak, adaptive", lambda case: _memory(_fastest(_masked(case, "adaptive")))),
        ("peak, random", lambda case: _memory(_fastest(_masked(case, "random")))),
    ]
    return table(columns, [[row for row in steps if (row.clips, row.tokens) == size] for size in sizes])


def table(columns: Sequence[Column], cases: Sequence[Case]) -> str:
    """Markdown, without the columns in which no case has anything; empty without cases."""
    if not cases:
        return ""
    filled = [(header, cells) for header, cell in columns if any(cells := [cell(case) for case in cases])]
    lines = [
        [header for header, _ in filled],
        ["---"] * len(filled),
        *zip(*(cells for _, cells in filled), strict=True),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fastest(case: Case) -> Row | None:
    """Of ours."""
    ours = [row for row in case if row.implementation.startswith(OURS)]
    return min(ours, key=lambda row: row.median_s, default=None)


def _masked(case: Case, masking: str) -> Case:
    return [row for row in case if f", {masking} " in row.op]


def _time_of(implementation: str, graph: bool) -> Callable[[Case], str]:
    return lambda case: _seconds(find(case, implementation, graph))


def _seconds(row: Row | None) -> str:
    return format_seconds(row.median_s) if row else ""


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _memory(row: Row | None) -> str:
    return f"{row.peak_bytes / 1e9:.3g} GB" if row and row.peak_bytes is not None else ""


def _rate(row: Row | None) -> str:
    if row is None or row.clips_per_s is None:
        return ""
    return f"{row.clips_per_s:,.0f}" if row.clips_per_s >= 100 else f"{row.clips_per_s:.3g}"


def _number(row: Row | None, column: str, form: str) -> str:
    value = getattr(row, column, None)
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")  # a missing marker or row, not a defect
