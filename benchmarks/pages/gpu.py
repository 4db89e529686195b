"""The page of a GPU, and the table that gpu.py prints at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.core import tables
from benchmarks.core.rows import COMPILED, COPY, OURS, PRODUCTS, Row, find, format_seconds, of_copy, of_official
from benchmarks.core.tables import Case, Column, by_case, grouped, number, table
from benchmarks.stages.gpu_run import TESTS, GpuRun, Prediction
from benchmarks.steps.options import option_groups
from benchmarks.steps.step import StepCase
from benchmarks.suites import gpu

_SLOW = ("LayerNorm", "casts and copies", "elementwise", "other")  # families that only move bytes, one prediction
_BYTES = "elementwise and LayerNorm"

# ----------------------------------------------------------------------------------------- the table at the end


def summary(run: GpuRun) -> str:
    """The facts, the tests, one table, the missed predictions and the failures."""
    parts = [facts(run), tests_line(run), headline(run), *explanations(run), profile_facts(run), sanitizer_line(run)]
    return "\n\n".join(filter(None, [*parts, failures_list(run)]))


def facts(run: GpuRun) -> str:
    """Device, versions, ceilings."""
    machine = run.machine
    if machine is None:
        return ""
    versions = [
        f"{name} {value}" for name in ("driver", "torch", "triton", "cudnn") if (value := getattr(machine, name))
    ]
    copy, product = machine.copy_bytes_per_s / 1e12, machine.product_flops / 1e12
    ceilings = f"a copy moves {copy:.3g} TB/s, a large product makes {product:.3g} TFLOP/s"
    commits = dict.fromkeys((machine.commit, *(row.commit for row in run.rows)))
    measured = f"{machine.device}, {', '.join(versions)}, commit {', '.join(commits)}, {machine.date}"
    return f"Ops and training steps on one {measured}, `python benchmarks/gpu.py`; {ceilings}."


def tests_line(run: GpuRun) -> str:
    """How the tests went, with the names of those that failed."""
    if not run.tests:
        return ""
    counts = Counter(each.outcome for each in run.tests)
    line = "Tests: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")) + "."
    if cut := [stage for stage in TESTS if run.stages.get(stage) not in ("done", "failed")]:
        line += f" Not all have run: {' and '.join(cut)}."
    failed = [f"- {each.test}: {each.message}" for each in run.tests if each.outcome == "failed"]
    return "\n".join([line, *failed])


def headline(run: GpuRun) -> str:
    """A line for each case of ours: prediction, floor, measured, ratio to the official formulation."""
    suites = ("steps", "compiled", "finetune", "ops")
    cases = by_case([row for suite in suites for row in run.of(suite)])
    lines = [Line(run, case, row) for case in cases for row in _best_of_ours(case)]
    columns: list[Column[Line]] = [
        ("", lambda line: line.name),
        ("predicted", lambda line: line.prediction.text if line.prediction else ""),
        ("floor", lambda line: "" if line.floor_s is None else format_seconds(line.floor_s)),
        ("measured", lambda line: format_seconds(line.row.median_s)),
        ("as its caller sees it", lambda line: tables.seconds(line.caller)),
        ("of official", lambda line: number(of_official(line.caller, line.case) if line.caller else None, "{:.2f}")),
        ("of official, compiled", lambda line: _of(line.caller, find(line.case, COMPILED))),
        ("of a copy's pace", lambda line: number(of_copy(line.row, line.case), "{:.0%}")),
        ("peak", lambda line: tables.memory(line.row)),
        ("clips/s", lambda line: tables.rate(line.row) if line.row.direction == "step" else ""),
    ]
    if not lines:
        return ""
    legend = (
        "Measured: by replay of a CUDA graph where there is one. Floor: the prediction's, else a copy of the bytes "
        "that must move, or the step's matrix products alone. Of official: as the callers see both; compiled by "
        "torch.compile."
    )
    if not any(line.prediction for line in lines):
        legend += " There is no prediction for this device."
    return f"{table(columns, lines)}\n\n{legend}"


def _of(row: Row | None, other: Row | None) -> str:
    return f"{row.median_s / other.median_s:.2f}" if row and other else ""


@dataclass(frozen=True)
class Line:
    """A row of ours that stands for its case."""

    run: GpuRun
    case: Case
    row: Row

    @property
    def name(self) -> str:
        """The case, and how it was compiled."""
        return f"{self.row.case}{self.row.implementation.removeprefix(OURS)}"

    @property
    def caller(self) -> Row | None:
        """The row as the caller sees it, with launches and waits."""
        return find(self.case, self.row.implementation)

    @property
    def prediction(self) -> Prediction | None:
        """The prediction of the row."""
        row = self.row
        return self.run.predicted(row.suite, row.case, row.implementation, row.timing)

    @property
    def floor_s(self) -> float | None:
        """The prediction's; else a copy of the bytes that must move, or the matrix products alone."""
        if self.prediction and self.prediction.floor_s is not None:
            return self.prediction.floor_s
        bounds = [row.median_s for row in self.case if row.implementation in (COPY, PRODUCTS)]
        return min(bounds, default=None)


def _best_of_ours(case: Case) -> list[Row]:
    """By graph replay where there is one, else as its caller sees it; each way of compiling apart."""
    names = dict.fromkeys(row.implementation for row in case if row.implementation.startswith(OURS))
    found = (find(case, name, graph=True) or find(case, name) for name in names)
    return [row for row in found if row]


def explanations(run: GpuRun) -> list[str]:
    """A paragraph for each prediction that was missed, with the profile or ncu's counters."""
    paragraphs = []
    for row in run.rows:
        predicted = run.predicted(row.suite, row.case, row.implementation, row.timing)
        if predicted and predicted.missed_by(row.median_s):
            measured = f"**{row.case}, {row.timing}**: {format_seconds(row.median_s)}, predicted {predicted.text}"
            paragraphs.append(f"{measured} ({predicted.how}). {_why(run, row)}")
    return paragraphs


def _why(run: GpuRun, row: Row) -> str:
    if row.direction != "step":
        return _counters(run, row) or "ncu has not counted it."
    families = family_seconds(run, row.case)
    if not families:
        return "This step has not been profiled."
    parts = []
    for name, seconds in sorted(families.items(), key=lambda item: -item[1]):
        predicted = run.predicted("profile", row.case, name, "")
        expected = f" (predicted {predicted.text})" if predicted else ""
        parts.append(f"{name} {format_seconds(seconds)}{expected}")
    ran = [share.name for share in run.shares if (share.case, share.kind) == (row.case, "attention")]
    return f"The profile has {', '.join(parts)}; attention by {' and '.join(ran) or 'none'}."


def family_seconds(run: GpuRun, case: str) -> dict[str, float]:
    """Seconds of a profiled step by family, with those that only move bytes as one."""
    found: dict[str, float] = {}
    for share in run.shares:
        if (share.case, share.kind) == (case, "family") and share.seconds is not None:
            name = _BYTES if share.name in _SLOW else share.name
            found[name] = found.get(name, 0.0) + share.seconds
    return found


def _counters(run: GpuRun, row: Row) -> str:
    kernel = {"reconstruction_error": "_error_kernel", "draw_mask": "_draw_mask_kernel"}.get(row.op)
    found = [each for each in run.findings if (each.tool, each.kernel) == ("ncu", kernel)]
    counted = [f"{each.metric} {each.value:g} {each.unit}".strip() for each in found]
    return f"ncu counts, by launch: {', '.join(counted)}." if counted else ""


def sanitizer_line(run: GpuRun) -> str:
    """The errors that compute-sanitizer found."""
    found = [f"{each.tool} {each.value:.0f} errors" for each in run.findings if each.metric == "errors"]
    return f"compute-sanitizer: {', '.join(found)}." if found else ""


def failures_list(run: GpuRun) -> str:
    """The names of the failures."""
    return "\n".join(f"FAILED {each.stage}: {each.what}: {each.error}" for each in run.failures)


# ------------------------------------------------------------------------------------------------------- the page


def gpu_page(run: GpuRun) -> str:
    """All that the rows say.

    Raises:
        ValueError: a kernel's test failed there. The speed of a wrong kernel is not published.
    """
    failed = [each.test for each in run.tests if each.outcome == "failed"]
    failed += [stage for stage in TESTS if run.stages.get(stage) == "failed"]
    if failed:
        raise ValueError(f"on {run.device} tests failed, so its times are not published: {', '.join(failed)}.")
    plot = f"![clips a second, memory and time of a step, over clips and tokens](sweep_{run.slug}.png)"
    return f"{section(run)}\n\n{plot}" if run.of("sweep") else section(run)


def section(run: GpuRun) -> str:
    """The page of a run whose tests may have failed."""
    parts = [f"# {run.device}", facts(run), tests_line(run), sanitizer_line(run), headline(run), *explanations(run)]
    for title, text in (
        ("Options of adaptive masking", options_table(run)),
        ("Adaptive beside random masking, over clips of a batch and tokens of a clip", sweep_table(run)),
        ("Kernels of a step, by torch's profiler", f"{profile_table(run)}\n\n{profile_facts(run)}".strip()),
    ):
        parts += [f"## {title}", text] if text else []
    return "\n\n".join(filter(None, [*parts, failures_list(run)]))


def profile_table(run: GpuRun) -> str:
    """A line for each family of kernels, a column for each profiled step."""
    steps = {case: family_seconds(run, case) for case in dict.fromkeys(share.case for share in run.shares)}
    columns: list[Column[str]] = [("Kernels", lambda family: family)]
    columns += [(case, partial(_cell, found)) for case, found in steps.items()]
    return table(columns, list(dict.fromkeys(family for found in steps.values() for family in found)))


def profile_facts(run: GpuRun) -> str:
    """For each profiled step the attention that ran, and how often the host waited."""
    lines = []
    for mine in grouped(run.shares, lambda share: share.case):
        ran = [f"{share.name} {share.share:.0%}" for share in mine if share.kind == "attention"]
        waits = [f"{share.calls:g} ({share.name})" for share in mine if share.kind == "waits"]
        facts = {"attention": ran, "waits for the device in a step": waits}
        told = "; ".join(f"{name}: {', '.join(each)}" for name, each in facts.items() if each)
        lines.append(f"{mine[0].case}: {told}.")
    return "\n\n".join(lines)


def _cell(found: Mapping[str, float], family: str) -> str:
    return format_seconds(found[family]) if family in found else ""


def options_table(run: GpuRun) -> str:
    """Each option beside the step that it is compared with, by graph replay where both steps have it."""
    rows = run.of("options")
    if not rows:
        return ""
    lines: list[tuple[str, str, Row, float, Row]] = []  # group, name, row, ratio, the row as its caller sees it
    for group, members in option_groups(gpu.option_step(quick=run.slug == "cpu")).items():
        named = {name: _step_rows(rows, case) for name, case in members.items()}
        first = next(iter(named.values()))
        for name, (caller, graph) in named.items():
            row, base = (graph, first[1]) if graph and first[1] else (caller, first[0])
            if row and base and caller:
                lines.append((group, name, row, row.median_s / base.median_s, caller))
    columns: list[Column[Any]] = [
        ("beside", lambda line: line[0]),
        ("step", lambda line: line[1]),
        ("time", lambda line: tables.seconds(line[2])),
        ("ratio", lambda line: f"{line[3]:.2f}"),
        ("as its caller sees it", lambda line: tables.seconds(line[4])),
        ("peak", lambda line: tables.memory(line[2])),
    ]
    legend = (
        "Time: by replay of a CUDA graph, where the step and the first of its group both have one. The official code "
        "reads from the device, which no graph can hold, so its group has the caller's time."
    )
    return f"{table(columns, lines)}\n\n{legend}"


def _step_rows(rows: Sequence[Row], case: StepCase) -> tuple[Row | None, Row | None]:
    """The row as the caller sees the step, and that of the replayed graph."""
    mine = [row for row in rows if row.case == case.name]
    return find(mine, case.label), find(mine, case.label, graph=True)


def sweep_table(run: GpuRun) -> str:
    """Adaptive beside random masking, over clips of a batch and tokens of a clip."""
    steps = [row for row in (*run.of("sweep"), *run.of("steps")) if row.direction == "step"]
    steps.sort(key=lambda row: (_size_of(row), row.tokens, row.clips))
    columns: list[Column[Case]] = [
        ("Model, clips x tokens", lambda case: f"{_size_of(case[0])}, {case[0].clips} x {case[0].tokens}"),
        ("adaptive 95%", lambda case: tables.seconds(_fastest(case, "adaptive 95%"))),
        ("random 95%", lambda case: tables.seconds(_fastest(case, "random 95%"))),
        ("clips/s, adaptive", lambda case: tables.rate(_fastest(case, "adaptive 95%"))),
        ("peak, adaptive", lambda case: tables.memory(_fastest(case, "adaptive 95%"))),
        ("peak, random", lambda case: tables.memory(_fastest(case, "random 95%"))),
    ]
    return table(columns, grouped(steps, lambda row: (_size_of(row), row.clips, row.tokens)))


def _size_of(row: Row) -> str:
    return row.op.removeprefix("training step of ").partition(",")[0]


def _fastest(case: Sequence[Row], masking: str) -> Row | None:
    mine = [row for row in case if row.op.endswith(f", {masking}") and row.implementation.startswith(OURS)]
    return min(mine, key=lambda row: row.median_s, default=None)
