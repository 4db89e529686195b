"""The rows that gpu.py wrote of one device, the predictions beside them, and the cases that have no rows yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.core.rows import Row, format_seconds, read_rows, read_texts
from benchmarks.stages.common import Failure
from benchmarks.stages.machine import Machine
from benchmarks.stages.outcomes import Outcome, last_outcomes
from benchmarks.stages.step_profile import Share, profiled_cases
from benchmarks.stages.suite import left
from benchmarks.stages.tools import Finding
from benchmarks.suites import gpu

PREDICTIONS = Path(__file__).parent.parent / "predictions.csv"
STAGES = "stages.csv"  # that gpu.py writes
TESTS = ("kernel-tests", "gpu-tests")  # of its stages
MISSED = 1 / 3  # of a prediction: a measurement that is further off is explained


@dataclass(frozen=True)
class Prediction:
    """A prediction of a row, written before the row was measured."""

    when: str  # "before", of the code as the first GPU found it, or "planned", of changes to come
    device: str  # the beginning of its name
    suite: str  # the row's; "profile" for a family of kernels in a profiled step
    case: str
    implementation: str  # the row's, or the family of kernels
    timing: str  # the row's; empty for a family
    floor_s: float | None  # no version can be faster
    low_s: float
    high_s: float
    how: str  # the prediction was made

    @property
    def text(self) -> str:
        """Both ends of the prediction."""
        ends = dict.fromkeys(format_seconds(each) for each in (self.low_s, self.high_s))
        return " to ".join(ends)

    def missed_by(self, seconds: float) -> bool:
        """Whether a measurement is further off than `MISSED`."""
        return not self.low_s * (1 - MISSED) <= seconds <= self.high_s * (1 + MISSED)


@dataclass(frozen=True)
class GpuRun:
    """All rows of one device in a folder."""

    slug: str
    machine: Machine | None
    tests: tuple[Outcome, ...]
    rows: tuple[Row, ...]
    shares: tuple[Share, ...]
    findings: tuple[Finding, ...]
    failures: tuple[Failure, ...]
    predictions: tuple[Prediction, ...]
    stages: Mapping[str, str]  # how each ended: "done", "failed" or "time"

    @property
    def device(self) -> str:
        """The device's name."""
        return self.machine.device if self.machine else self.rows[0].device if self.rows else self.slug

    def of(self, suite: str) -> list[Row]:
        """A suite's rows."""
        return [row for row in self.rows if row.suite == suite]

    def predicted(self, suite: str, case: str, implementation: str, timing: str) -> Prediction | None:
        """The prediction that was written before the first GPU ran the code."""
        wanted = ("before", suite, case, implementation, timing)
        for each in self.predictions:
            its = each.when, each.suite, each.case, each.implementation, each.timing
            if its == wanted and self.device.startswith(each.device):
                return each
        return None


def read_run(folder: Path, slug: str) -> GpuRun:
    """The rows of a device; empty for files that are not there."""

    def read(name: str, kind: type[Any]) -> tuple[Any, ...]:
        return tuple(read_rows(folder / f"{name}_{slug}.csv", kind))

    return GpuRun(
        slug,
        next(iter(read("machine", Machine)), None),
        tuple(last_outcomes(read("tests", Outcome))),
        tuple(row for suite in gpu.SUITES for row in read(suite, Row)),
        read("profile", Share),
        (*read("sanitizer", Finding), *read("ncu", Finding)),
        read("failures", Failure),
        tuple(read_rows(PREDICTIONS, Prediction)),
        {row["stage"]: row["status"] for row in read_texts(folder / STAGES)},
    )


def missing_rows(run: GpuRun, device: torch.device, quick: bool) -> dict[str, tuple[int, int]]:
    """For each stage that lacks rows, the number of cases without them, and of all cases."""
    found = {}
    for suite in gpu.SUITES:
        units = gpu.units(suite, device, quick)
        found[suite] = sum(bool(left(unit, run.of(suite), device)) for unit in units), len(units)
    profiled = {share.case for share in run.shares if share.kind == "waits"}
    cases = profiled_cases(quick)
    found["profile"] = sum(case.name not in profiled for case in cases), len(cases)
    found["machine"] = int(run.machine is None), 1
    return {stage: (missing, count) for stage, (missing, count) in found.items() if missing}


def not_measured(run: GpuRun, device: torch.device, quick: bool) -> list[str]:
    """The cases without rows, for people, and the other stages that have not ended well."""
    rows = missing_rows(run, device, quick)
    others = [name for name, status in run.stages.items() if name not in rows and status not in ("done", "")]
    counted = [f"{stage}: {missing} of {count}" for stage, (missing, count) in rows.items()]
    return [*counted, *(f"{name} ({run.stages[name]})" for name in others if name not in gpu.SUITES)]
