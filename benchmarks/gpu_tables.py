"""What gpu.py's rows say, as Markdown: the table at its end, and the README's section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_cases
import tables
from gpu_rows import TESTS, GpuRun, Prediction
from option_cases import PART, option_groups
from rows import COPY, OURS, PRODUCTS, Row, find, format_seconds, of_copy, of_official
from steps import StepCase
from tables import Case, by_case, number, table

_SLOW = ("LayerNorm", "casts and copies", "elementwise", "other")  # families that only move bytes, one prediction
_BYTES = "elementwise and LayerNorm"

# ----------------------------------------------------------------------------------------- the table at the end


def summary(run: GpuRun) -> str:
    """The facts, the tests, one table, what was missed and why, and what failed."""
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
    return f"{machine.device}; {', '.join(versions)}; commit {machine.commit}, {machine.date}; {ceilings}."


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
    cases = [case for suite in ("steps", "ops", "compiled") for case in by_case(run.of(suite))]
    lines = [Line(run, case, row) for case in cases for row in _best_of_ours(case)]
    columns: list[tuple[str, Callable[[Line], str]]] = [
        ("", lambda line: line.name),
        ("predicted", lambda line: line.prediction.text if line.prediction else ""),
        ("floor", lambda line: "" if line.floor_s is None else format_seconds(line.floor_s)),
        ("measured", lambda line: format_seconds(line.row.median_s)),
        ("as its caller sees it", lambda line: tables.seconds(line.caller)),
        ("of official", lambda line: number(of_official(line.caller, line.case) if line.caller else None, "{:.2f}")),
        ("of a copy's pace", lambda line: number(of_copy(line.row, line.case), "{:.0%}")),
        ("peak", lambda line: tables.memory(line.row)),
        ("clips/s", lambda line: tables.rate(line.row) if line.row.direction == "step" else ""),
    ]
    if not lines:
        return ""
    legend = (
        "Measured: by replay of a CUDA graph where there is one. Floor: the prediction's, else a copy of the bytes "
        "that must move, or the step's matrix products alone. Of official: as its caller sees it, over the official "
        "formulation's."
    )
    if not any(line.prediction for line in lines):
        legend += " There is no prediction for this device."
    return f"{table(columns, lines)}\n\n{legend}"


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
        """The same with launches and waits."""
        return find(self.case, self.row.implementation)

    @property
    def prediction(self) -> Prediction | None:
        """Of the row."""
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
    """A paragraph for each prediction that was missed: what the profile, or ncu, says of it."""
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
    """What compute-sanitizer found."""
    found = [f"{each.tool} {each.value:.0f} errors" for each in run.findings if each.metric == "errors"]
    return f"compute-sanitizer: {', '.join(found)}." if found else ""


def failures_list(run: GpuRun) -> str:
    """What could not be measured, by name."""
    return "\n".join(f"FAILED {each.stage}: {each.what}: {each.error}" for each in run.failures)


# ------------------------------------------------------------------------------------------- the README's section


def section(run: GpuRun) -> str:
    """All that the rows say, for a page."""
    parts = [f"### {run.device}", facts(run), tests_line(run), headline(run), *explanations(run)]
    parts += [profile_table(run), profile_facts(run), options_table(run), parts_table(run), sweep_table(run)]
    parts.append(sanitizer_line(run))
    return "\n\n".join(filter(None, [*parts, failures_list(run)]))


def profile_table(run: GpuRun) -> str:
    """A line for each family of kernels, a column for each profiled step."""
    cases = list(dict.fromkeys(share.case for share in run.shares))
    families = list(dict.fromkeys(name for case in cases for name in family_seconds(run, case)))
    columns: list[tuple[str, Callable[[str], str]]] = [("Kernels", lambda family: family)]
    for case in cases:
        found = family_seconds(run, case)
        columns.append((case, partial(_cell, found)))
    return table(columns, families)


def profile_facts(run: GpuRun) -> str:
    """For each profiled step which attention ran, what LayerNorm's casts took, and how often the host waited."""
    lines = []
    for case in dict.fromkeys(share.case for share in run.shares):
        mine = [share for share in run.shares if share.case == case]
        ran = [f"{share.name} {share.share:.0%}" for share in mine if share.kind == "attention"]
        casts = [format_seconds(share.seconds) for share in mine if share.kind == "LayerNorm" and share.seconds]
        waits = [f"{share.calls:g} ({share.name})" for share in mine if share.kind == "waits"]
        facts = {"attention": ran, "casts of LayerNorm's input": casts, "waits for the device in a step": waits}
        lines.append(
            f"{case}: " + "; ".join(f"{name}: {', '.join(each)}" for name, each in facts.items() if each) + "."
        )
    return "\n\n".join(lines)


def _cell(found: Mapping[str, float], family: str) -> str:
    return format_seconds(found[family]) if family in found else ""


def options_table(run: GpuRun) -> str:
    """What each option costs beside what it is compared with."""
    rows = [row for row in run.of("options") if row.op != PART]
    if not rows:
        return ""
    step = gpu_cases.option_step(quick=run.slug == "cpu")
    cases: list[tuple[str, str, Row, float]] = []
    for group, members in option_groups(step).items():
        found = {name: _step_row(rows, case) for name, case in members.items()}
        first = next(iter(found.values()))
        cases += [(group, name, row, row.median_s / first.median_s) for name, row in found.items() if row and first]
    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("beside", lambda case: case[0]),
        ("step", lambda case: case[1]),
        ("time", lambda case: tables.seconds(case[2])),
        ("ratio", lambda case: f"{case[3]:.2f}"),
        ("peak", lambda case: tables.memory(case[2])),
    ]
    return table(columns, cases)


def _step_row(rows: Iterable[Row], case: StepCase) -> Row | None:
    mine = [row for row in rows if (row.case, row.implementation) == (case.name, case.label)]
    return find(mine, case.label)  # as their callers see them: the official formulation has nothing else


def parts_table(run: GpuRun) -> str:
    """The samplers and the encoder alone, over the tokens of a clip."""
    rows = [row for row in run.of("options") if row.op == PART]
    names = list(dict.fromkeys(row.implementation for row in rows))
    columns: list[tuple[str, Callable[[Case], str]]] = [("tokens", lambda case: f"{case[0].tokens:,}")]
    columns += [(name, partial(_time_of, name)) for name in names]
    return table(columns, by_case(rows))


def _time_of(implementation: str, case: Case) -> str:
    return tables.seconds(find(case, implementation))


def sweep_table(run: GpuRun) -> str:
    """Adaptive beside random masking, over clips of a batch and tokens of a clip."""
    steps = [row for row in (*run.of("sweep"), *run.of("steps")) if row.direction == "step"]
    steps.sort(key=lambda row: (_size_of(row), row.tokens, row.clips))
    sizes = dict.fromkeys((_size_of(row), row.clips, row.tokens) for row in steps)
    columns: list[tuple[str, Callable[[Case], str]]] = [
        ("Model, clips x tokens", lambda case: f"{_size_of(case[0])}, {case[0].clips} x {case[0].tokens}"),
        ("adaptive 95%", lambda case: tables.seconds(_fastest(case, "adaptive 95%"))),
        ("random 95%", lambda case: tables.seconds(_fastest(case, "random 95%"))),
        ("clips/s, adaptive", lambda case: tables.rate(_fastest(case, "adaptive 95%"))),
        ("peak, adaptive", lambda case: tables.memory(_fastest(case, "adaptive 95%"))),
        ("peak, random", lambda case: tables.memory(_fastest(case, "random 95%"))),
    ]
    grouped = [[row for row in steps if (_size_of(row), row.clips, row.tokens) == size] for size in sizes]
    return table(columns, grouped)


def _size_of(row: Row) -> str:
    return row.op.removeprefix("training step of ").partition(",")[0]


def _fastest(case: Sequence[Row], masking: str) -> Row | None:
    mine = [row for row in case if row.op.endswith(f", {masking}") and row.implementation.startswith(OURS)]
    return min(mine, key=lambda row: row.median_s, default=None)
