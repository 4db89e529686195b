"""Measures a suite of suites/gpu.py: each case is checked, then timed, in a process that a failure does not outlive.

    python -m benchmarks.stages.suite steps --output runs/gpu

Goes on where an earlier run into the same folder ended: what has its rows is passed over, what failed is tried again
after the rest. A case that fails is named, in failures_<device>.csv and at the end, and costs only itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.core.rows import Row, RowWriter, format_seconds, read_rows
from benchmarks.core.worker import Worker, WorkFailed
from benchmarks.ops.base import OpCase
from benchmarks.stages.common import Failures, Told, parser, told
from benchmarks.suites import gpu
from benchmarks.suites.measure import Unit, measure

_OP_S, _STEP_S, _QUICK_S = 0.3, 1.2, 0.05  # of one timing
_LIMIT_S, _COMPILE_LIMIT_S = 90.0, 300.0  # from one row of a case to the next


def main(suite: str, where: Told) -> int:
    """Measures what is left; the number of cases that failed."""
    began, path = time.perf_counter(), where.file(suite)
    units, failed = gpu.units(suite, where.device, where.quick), Failures(suite, where)
    with RowWriter(path, Row, read_rows(path, Row)) as rows, Worker() as worker:
        for unit in sorted(units, key=lambda unit: unit.name in failed.before):
            missing = left(unit, rows.rows, where.device)
            if not missing:
                continue
            found = []
            try:
                for row in _measured(worker, unit, missing, where):
                    rows.add(row)
                    found.append(f"{format_seconds(row.median_s)} ({row.timing})")
            except WorkFailed as error:
                failed.add(unit.name, error)
            print(f"[{time.perf_counter() - began:4.0f} s] {unit.name}: {', '.join(found)}", flush=True)
    return failed.count


def left(unit: Unit, rows: list[Row], device: torch.device) -> list[str]:
    """The ways of timing a unit that there are no rows of."""
    case = unit.case.subject(unit.suite).case
    done = {row.timing for row in rows if (row.case, row.implementation) == (case, unit.label)}
    return [timing for timing in unit.timings(device) if timing not in done]


def _measured(worker: Worker, unit: Unit, timings: list[str], where: Told) -> Iterator[Row]:
    budget = _QUICK_S if where.quick else _OP_S if isinstance(unit.case, OpCase) else _STEP_S
    limit = _COMPILE_LIMIT_S if gpu.is_slow_to_compile(unit) else _LIMIT_S
    return worker.stream(measure, unit, timings, where.device, budget, where.commit, limit_s=limit)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("suite", choices=gpu.SUITES)
    given = arguments.parse_args()
    sys.exit(min(main(given.suite, told(given)), 1))
