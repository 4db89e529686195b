"""Makes tables and plots of the rows that run.py, gpu.py and the others wrote, and of nothing else: no row, no figure.

    python benchmarks/report.py                                            # into README.md, between its markers
    python benchmarks/report.py --results benchmarks/results runs/gpu      # with the rows of gpu.py's folder
    python benchmarks/report.py --readme copy.md

The plots go beside the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_rows
import gpu_tables
import plots
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
    Row,
    find,
    kept_rows,
    of_copy,
    of_official,
    read_rows,
    read_texts,
)
from study_tables import study_facts, study_table, study_title
from tables import Case, Column, by_case, number, rate, seconds, table

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HOSTS_BEGIN, HOSTS_END = "<!-- hosts: begin -->", "<!-- hosts: end -->"
GPU = "<!-- gpu: begin -->", "<!-- gpu: end -->"
OPTIONS = "<!-- options: begin -->", "<!-- options: end -->"
STUDY = "<!-- study: begin -->", "<!-- study: end -->"
NO_GPU_ROWS = "No GPU has measured this yet: there are no rows of one, and so no figures."

_TIMES = (  # columns of times: header, implementation
    ("ours", OURS),
    ("official", OFFICIAL),
    ("official, compiled", COMPILED),
    (ADAMAE, ADAMAE),
    (VIDEOMAE, VIDEOMAE),
    (PRODUCTS, PRODUCTS),
)


@dataclass(frozen=True)
class Options:
    """What is read and written; `parse` says what each is."""

    readme: Path = Path(__file__).parent.parent / "README.md"
    results: tuple[Path, ...] = (RESULTS,)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The command line's."""
    usual = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=usual.readme, help="the file that gets the tables")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=usual.results, help="folders of rows, which get the plots"
    )
    given = parser.parse_args(arguments)
    return Options(given.readme, tuple(given.results))


def main(options: Options) -> None:
    """Writes plots and tables.

    Raises:
        ValueError: there are no rows, or a marker is missing.
    """
    text, path = options.readme.read_text(encoding="utf-8"), options.readme
    runs: list[gpu_rows.GpuRun] = []
    pictures: list[Path] = []
    for folder in options.results:
        refuse_tiny_sizes(folder)
        rows, found_runs = read_cpu(folder), read_gpu_runs(folder)
        hosts = [row for row in rows if row.suite == "hosts"]
        found = {
            (BEGIN, END): cpu_section(rows),
            (HOSTS_BEGIN, HOSTS_END): patched_hosts(hosts) if hosts else "",
            OPTIONS: options_tables(folder),
            STUDY: study_tables(folder),
        }
        if not any(found.values()) and not found_runs:
            raise ValueError(f"{folder} has no rows of run.py, gpu.py, options_cost.py or study.py.")
        for markers, tables in found.items():
            text = insert(text, tables, path, markers) if tables else text
        runs += found_runs
        pictures += plots.draw(rows, folder, "cpu")
        pictures += [picture for run in found_runs for picture in plots.draw(run.rows, folder, run.slug)]
    if GPU[0] in text or runs:
        text = insert(text, gpu_section(runs), path, GPU)
    options.readme.write_text(text, encoding="utf-8")
    for picture in pictures:
        print(f"wrote {picture}")
    print(f"wrote the tables in {options.readme}")


def refuse_tiny_sizes(folder: Path) -> None:
    """Raises ValueError for the folder of a rehearsal."""
    versions = folder / "versions.json"
    if versions.exists() and json.loads(versions.read_text(encoding="utf-8")).get("size") == "quick":
        raise ValueError(f"{folder} has rows of gpu.py --quick: its sizes are tiny, and tell no speed.")


def read_cpu(folder: Path) -> list[Row]:
    """The rows that run.py wrote."""
    files = (folder / f"{suite}_cpu.csv" for suite in ("steps", "sweep", "ops", "hosts"))
    return [row for file in files for row in kept_rows(file, Row)]


def read_gpu_runs(folder: Path) -> list[gpu_rows.GpuRun]:
    """The rows that gpu.py wrote, by device; rehearsals on a CPU are none."""
    slugs = (path.stem.removeprefix("machine_") for path in sorted(folder.glob("machine_*.csv")))
    return [gpu_rows.read_run(folder, slug) for slug in slugs if slug != "cpu"]


def gpu_section(runs: Sequence[gpu_rows.GpuRun]) -> str:
    """What all GPUs' rows say.

    Raises:
        ValueError: a kernel's test failed there: no speed is told of what is wrong.
    """
    for run in runs:
        failed = [each.test for each in run.tests if each.outcome == "failed"]
        failed += [stage for stage in gpu_rows.TESTS if run.stages.get(stage) == "failed"]
        if failed:
            raise ValueError(f"on {run.device} tests failed, so its times are not published: {', '.join(failed)}.")
    return "\n\n".join(map(gpu_tables.section, runs)) if runs else NO_GPU_ROWS


def insert(text: str, tables: str, path: Path, markers: tuple[str, str]) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: it does not hold each marker once, in their order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} must hold {begin} and, after it, {end}, once each: the tables go between them.")
    return f"{text.partition(begin)[0]}{begin}\n\n{tables}\n\n{end}{text.partition(end)[2]}"


def cpu_section(rows: Sequence[Row]) -> str:
    """The tables of run.py's rows, but those of the hosts."""
    measured = [row for row in rows if row.suite != "hosts"]
    if not measured:
        return ""
    parts = [heading(measured), comparison([row for row in measured if row.suite == "steps"], "Training step")]
    for suite in ("ops", "sweep"):
        ops = [row for row in measured if row.suite == suite and row.direction != "step"]
        parts.append(comparison(ops, "Op" if suite == "ops" else "Op, over the tokens of a clip"))
    return "\n\n".join(filter(None, parts))


def options_tables(results: Path) -> str:
    """What the options cost on a CPU, of the rows of options_cost.py; empty without."""
    parts = []
    for path in sorted(results.glob("options_cpu.csv")):
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
    columns: list[Column[Case]] = [
        ("A training step", lambda case: case[0].case),
        ("visible of", lambda case: f"{case[0].visible} of {case[0].tokens}"),
        (UNPATCHED, lambda case: seconds(find(case, UNPATCHED))),
        (PATCHED, lambda case: seconds(find(case, PATCHED))),
        ("ratio", _ratio_of_patched),
    ]
    first = rows[0]
    facts = f"{first.device}, torch {first.torch}, {first.threads} threads, fp32; medians, commit {first.commit}."
    return f"{table(columns, by_case(rows))}\n\n{facts}"


def _ratio_of_patched(case: Case) -> str:
    patched, unpatched = find(case, PATCHED), find(case, UNPATCHED)
    return f"{patched.median_s / unpatched.median_s:.2f}" if patched and unpatched else ""


def heading(rows: Sequence[Row]) -> str:
    """The device, and what ran on it."""
    facts = dict.fromkeys(f"torch {row.torch}, {row.threads} threads" for row in rows)
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    return f"### {rows[0].device}\n\n{'; '.join(facts)}; commit {commits}. Medians."


def comparison(rows: Sequence[Row], title: str) -> str:
    """A line for each case, a column for each implementation that was timed; empty without rows."""
    columns: list[Column[Case]] = [(title, lambda case: case[0].case)]
    columns += [(header, lambda case, name=name: seconds(find(case, name))) for header, name in _TIMES]  # type: ignore[misc]
    columns += [
        ("ours / official", lambda case: _of_ours(case, of_official, "{:.2f}")),
        ("ours, of a copy's pace", lambda case: _of_ours(case, of_copy, "{:.0%}")),
    ]
    if any(row.direction == "step" for row in rows):
        columns.append(("ours, clips/s", lambda case: rate(find(case, OURS))))
    return table(columns, by_case(rows))


def _of_ours(case: Case, what: Callable[[Row, Case], float | None], form: str) -> str:
    ours = find(case, OURS)
    return number(what(ours, case), form) if ours else ""


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")  # a missing marker or row, not a defect
