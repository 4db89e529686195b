"""Makes the pages and plots in benchmarks/results of the rows there, and of nothing else: no row, no figure.

python -m benchmarks.report                     # pages and plots beside the rows
python -m benchmarks.report --results runs/gpu  # for the folder of gpu.py, or several
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.core.rows import OURS, RESULTS, Row, find, read_rows
from benchmarks.core.tables import Column, source, table
from benchmarks.pages import plots
from benchmarks.pages.cpu import counts_page, cpu_page, hosts_page, loader_page, options_page
from benchmarks.pages.estimators import estimators_page
from benchmarks.pages.gpu import gpu_page
from benchmarks.pages.strategies import strategies_page
from benchmarks.stages.gpu_run import GpuRun, read_run
from benchmarks.steps.options import FAST, option_groups
from benchmarks.steps.step import StepCase

_PAGES = {
    "cpu": cpu_page,
    "hosts": hosts_page,
    "options": options_page,
    "estimators": estimators_page,
    "strategies": strategies_page,
    "loader": loader_page,
    "counts": counts_page,
}


def main(folders: Sequence[Path]) -> None:
    """Writes the pages and plots of each folder.

    Raises:
        ValueError: a folder has no rows, or rows of a rehearsal, or rows of kernels whose tests failed.
    """
    for folder in folders:
        for name, text in pages(folder).items():
            (folder / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")
            print(f"wrote {folder / name}.md")
        for picture in plots.draw(folder, gpu_runs(folder)):
            print(f"wrote {picture}")


def pages(folder: Path) -> dict[str, str]:
    """Name and text of every page that there are rows for; see `main` for what it raises."""
    versions = folder / "versions.json"
    if versions.exists() and json.loads(versions.read_text(encoding="utf-8")).get("size") == "quick":
        raise ValueError(f"{folder} has rows of gpu.py --quick: its sizes are tiny, and tell no speed.")
    runs = gpu_runs(folder)
    found = {name: page(folder) for name, page in _PAGES.items()}
    for run in runs:
        short = run.slug.removeprefix("nvidia_").partition("_")[0]  # "h100"
        found[run.slug if short in found else short] = gpu_page(run)
    found["summary"] = summary_page(folder, runs)
    if not any(found.values()):
        raise ValueError(
            f"{folder} has no rows of run.py, strategies.py, estimator_bias.py, loader.py, step_bytes.py or gpu.py."
        )
    return {name: text for name, text in found.items() if text}


def gpu_runs(folder: Path) -> list[GpuRun]:
    """The rows that gpu.py wrote, by device; rehearsals on a CPU are none."""
    slugs = (path.stem.removeprefix("machine_") for path in sorted(folder.glob("machine_*.csv")))
    return [read_run(folder, slug) for slug in slugs if slug != "cpu"]


def summary_page(folder: Path, runs: Sequence[GpuRun]) -> str:
    """One table: a training step with random masking, the exact method and the fast setting; empty without rows."""
    cases = {"random": StepCase(masking="random"), "exact": StepCase(), "fast": StepCase(**FAST)}
    columns: list[Column[str]] = [("method", lambda name: name)]
    sources = []
    group = next(iter(option_groups(StepCase())))  # that of the three which took turns on the CPU
    on_cpu = {row.implementation: row for row in read_rows(folder / "options_cpu.csv", Row) if row.case == group}
    if on_cpu:
        of_random = {name: row.of_first / on_cpu["random"].of_first for name, row in on_cpu.items()}  # type: ignore[operator]
        columns.append(("CPU, 2 clips (s)", lambda name: f"{on_cpu[name].median_s:.2f}"))
        columns.append(("of random", lambda name: f"{of_random[name]:.2f}"))
        told = "fp32, ratios by round (`python -m benchmarks.run --suite options`)"
        sources.append(f"{source(list(on_cpu.values()))}, {told}")
    for run in runs:
        rows = {name: [row for row in run.of("steps") if row.case == case.name] for name, case in cases.items()}
        found = {name: row for name, mine in rows.items() if (row := find(mine, OURS, graph=True))}
        if len(found) == len(cases):
            columns += _gpu_columns(run.device.split()[1], found)
            sources.append(f"{source(list(found.values()))}, bf16, replay of a CUDA graph (`python benchmarks/gpu.py`)")
    if not sources:
        return ""
    about = f"A training step of ViT-B on clips of 16 x 224 x 224 at 95%, median: {'; '.join(sources)}."
    return f"# Summary\n\n{about}\n\n{table(columns, list(cases))}"


def _gpu_columns(device: str, rows: Mapping[str, Row]) -> list[Column[str]]:
    return [
        (f"{device}, 256 clips (ms)", lambda name: f"{1e3 * rows[name].median_s:.0f}"),
        ("of random", lambda name: f"{rows[name].median_s / rows['random'].median_s:.2f}"),
        ("peak (GB)", lambda name: f"{(rows[name].peak_bytes or 0) / 1e9:.1f}"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=(RESULTS,), help="folders of rows")
    try:
        main(parser.parse_args().results)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")  # a missing row, not a defect
