"""The pages of rows that need no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.core.rows import (
    COMPILED,
    OFFICIAL,
    OURS,
    PRODUCTS,
    Row,
    find,
    of_copy,
    of_official,
    read_rows,
    read_texts,
)
from benchmarks.core.tables import Case, Column, by_case, grouped, number, rate, seconds, source, table
from benchmarks.steps.hosts import PATCHED, POOLED, UNPATCHED
from benchmarks.steps.options import PART

_REPOSITORIES = ("AdaMAE repository", "VideoMAE repository")  # the committed rows have them; nothing times them now
_TIMES = {"ours": OURS, "official": OFFICIAL, "official, compiled": COMPILED}  # header and implementation
_TIMES |= {name: name for name in (*_REPOSITORIES, PRODUCTS)}
_TITLES = {"steps": "Training step", "finetune": "Fine-tuning step", "ops": "Op"}


def cpu_page(results: Path) -> str:
    """Ops and training steps beside the official formulation."""
    rows = {suite: _rows(results, suite) for suite in _TITLES}
    if not any(rows.values()):
        return ""
    parts = ["# Ops and training steps on a CPU"]
    for suite, mine in rows.items():
        command = f"`python -m benchmarks.run --suite {suite}`"
        parts += [f"Medians of {source(mine)}, {command}:", comparison(mine, _TITLES[suite])] if mine else []
    return "\n\n".join(parts)


def comparison(rows: Sequence[Row], title: str) -> str:
    """A line for each case, a column for each implementation that was timed."""
    columns: list[Column[Case]] = [(title, lambda case: case[0].case)]
    columns += [(header, partial(_time, name)) for header, name in _TIMES.items()]
    columns += [
        ("ours / official", lambda case: _of_ours(of_official, case, "{:.2f}")),
        ("ours, of a copy's pace", lambda case: _of_ours(of_copy, case, "{:.0%}")),
        ("ours, clips/s", lambda case: rate(find(case, OURS)) if case[0].direction == "step" else ""),
    ]
    return table(columns, by_case(rows))


def hosts_page(results: Path) -> str:
    """Training steps of the hosts, unpatched and patched."""
    rows = _rows(results, "hosts")
    if not rows:
        return ""
    columns: list[Column[Case]] = [
        ("Training step", lambda case: case[0].case),
        ("visible of", lambda case: f"{case[0].visible} of {case[0].tokens}"),
        *((name, partial(_time, name)) for name in (UNPATCHED, PATCHED, POOLED)),
        *((f"{name}, of unpatched", partial(_of_first, name)) for name in (PATCHED, POOLED)),
    ]
    about = (
        f"Medians of {source(rows)}, fp32, `python -m benchmarks.run --suite hosts --checkouts FOLDER`. The three take "
        'turns, and a ratio is the median of the ratios within a round. "pooled" is `patch(model, network="pooled")`.'
    )
    return f"# Hosts, unpatched and patched\n\n{about}\n\n{table(columns, by_case(rows))}"


def options_page(results: Path) -> str:
    """Steps with the options of adaptive masking, each beside the first of its group; and parts over more tokens."""
    rows = _rows(results, "options")
    if not rows:
        return ""
    steps = [row for row in rows if row.op != PART]
    columns: list[Column[Row]] = [
        ("beside", lambda row: row.case),
        ("step", lambda row: row.implementation),
        ("time", seconds),
        ("ratio", lambda row: number(row.of_first, "{:.2f}")),
    ]
    about = (
        f"Medians of {source(rows)}, ViT-B, 2 clips, fp32, `python -m benchmarks.run --suite options`. A ratio is the "
        "median of the ratios within a round, and differs from that of the medians on a busy machine."
    )
    parts = ["# Options of adaptive masking on a CPU", about, table(columns, steps)]
    if len(steps) < len(rows):
        parts += ["Both passes of the samplers and of the encoder alone; in brackets, times those of the first line:"]
        parts += [_parts_table(rows), "![seconds over the tokens of a clip](options_cpu.png)"]
    return "\n\n".join(parts)


def _parts_table(rows: Sequence[Row]) -> str:
    parts = [row for row in rows if row.op == PART]
    fewest = {row.implementation: row.median_s for row in reversed(parts)}
    columns: list[Column[Case]] = [("tokens", lambda case: f"{case[0].tokens:,}")]
    columns += [(name, partial(_part, name, least)) for name, least in reversed(fewest.items())]
    return table(columns, by_case(parts))


def _part(name: str, least: float, case: Case) -> str:
    found = find(case, name)
    return f"{seconds(found)} ({found.median_s / least:.1f})" if found else ""


def loader_page(results: Path) -> str:
    """Clips a second of one core, by reader."""
    rows = read_texts(results / "loader_cpu.csv")
    return f"# Reading videos\n\n{loader_tables(rows)}" if rows else ""


def loader_tables(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each kind of videos, a column for each decoder, and the training step beneath."""
    reads = [row for row in rows if row["what"] == "read and crop"]
    kinds = grouped([row for row in rows if row["videos"]], lambda row: row["videos"])
    columns: list[Column[Any]] = [
        ("Videos, 10 s at 30 frames/s", lambda kind: kind[0]["videos"]),
        ("KiB each", lambda kind: f"{float(kind[0]['kib']):.0f}"),
    ]
    for name in dict.fromkeys(f"{row['decoder']} {row['version']}" for row in reads):
        columns.append((name, partial(_clips_per_second, name)))
    columns.append(("of which crop and resize", lambda kind: f"{1e3 * float(kind[-1]['median_s']):.0f} ms"))
    about = f"Clips a second of one core, {source(reads)}, `python -m benchmarks.loader`."
    lines = [
        f"A training step beside it ({row['what']}): {float(row['clips_per_s']):.2f} clips/s on {row['threads']} core."
        for row in rows
        if not row["videos"]
    ]
    return "\n\n".join([about, table(columns, kinds), *lines])


def _clips_per_second(name: str, kind: Sequence[Mapping[str, str]]) -> str:
    found = (row for row in kind if f"{row['decoder']} {row['version']}" == name)
    return next((f"{float(row['clips_per_s']):.1f}" for row in found), "")


def counts_page(results: Path) -> str:
    """Bytes of a step and registers of the kernels."""
    moved, kernels = read_texts(results / "step_bytes.csv"), read_texts(results / "kernel_resources.csv")
    if not moved or not kernels:
        return ""
    about = "A GPU's work, counted on a CPU without one."
    of_bytes = (
        "GiB that a step of ViT-B at 95%, 256 clips, bf16, reads and writes for each clip, by family of operators, and "
        "keeps for its backward pass, `python -m benchmarks.step_bytes`:"
    )
    of_kernels = (
        "The most that each kernel takes in any of its cases, compiled for sm_90; the rows have sm_80 and "
        "sm_100 too, `python -m benchmarks.kernel_resources`:"
    )
    parts = ["# Counts without a GPU", about, of_bytes, bytes_table(moved), of_kernels, kernels_table(kernels)]
    return "\n\n".join(parts)


def bytes_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each setting of each commit."""
    numbers = ("products", "attention", "package", "elementwise", "saved", "saved_fp32")
    columns: list[Column[Any]] = [("GiB of a clip", lambda row: row["setting"]), ("commit", lambda row: row["commit"])]
    columns += [(name.replace("_", ", of it "), partial(_three_digits, name)) for name in numbers]
    return table(columns, rows)


def _three_digits(name: str, row: Mapping[str, str]) -> str:
    return f"{float(row[name]):.3f}"


def kernels_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each kernel: the most that it takes in any case, by version of Triton."""
    mine = [row for row in rows if row["architecture"] == "sm_90"]
    columns: list[Column[Any]] = [("kernel", lambda kernel: f"`{kernel[0]['kernel']}`")]
    for version in dict.fromkeys(row["triton"] for row in mine):
        for name in ("registers", "spilled_bytes"):
            columns.append((f"{name.replace('_', ' ')}, Triton {version}", partial(_most, version, name)))
    return table(columns, grouped(mine, lambda row: row["kernel"]))


def _most(version: str, name: str, kernel: Sequence[Mapping[str, str]]) -> str:
    return str(max((int(row[name]) for row in kernel if row["triton"] == version), default=""))


def _rows(results: Path, suite: str) -> list[Row]:
    return read_rows(results / f"{suite}_cpu.csv", Row)


def _time(implementation: str, case: Case) -> str:
    return seconds(find(case, implementation))


def _of_ours(what: Any, case: Case, form: str) -> str:
    ours = find(case, OURS)
    return number(what(ours, case), form) if ours else ""


def _of_first(name: str, case: Case) -> str:
    found = find(case, name)
    return number(found.of_first, "{:.2f}") if found else ""
