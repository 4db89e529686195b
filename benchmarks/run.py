"""Runs the benchmarks on a CPU: first checks that everything compared gives the same, then times it in turns.

    python -m benchmarks.run                             # ops, training steps and fine-tuning
    python -m benchmarks.run --suite ops
    python -m benchmarks.run --suite options             # the options of adaptive masking; ten minutes
    python -m benchmarks.run --suite hosts               # patched beside unpatched models
    python -m benchmarks.run --quick                     # tiny sizes, to see that it works

On a GPU gpu.py runs them. Each row goes to benchmarks/results/SUITE_cpu.csv as it is measured, and
`python -m benchmarks.report` makes pages and plots of the rows. A failed check ends the run before any time is taken.
A case that cannot be measured is reported at the end. CPU times need an idle machine: a thread that waits for another
loses milliseconds to any other program. The share of the CPU that other programs took is printed last.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.core.commit import current_commit
from benchmarks.core.rows import OFFICIAL, RESULTS, Facts, Row, RowWriter, facts_of, format_seconds
from benchmarks.core.worker import in_one_line
from benchmarks.steps.finetune import FinetuneStep
from benchmarks.steps.hosts import host_groups
from benchmarks.steps.step import AnyStep, check_step
from benchmarks.suites import cpu
from benchmarks.suites.measure import (
    CPU,
    measure_op_in_turns,
    measure_options_in_turns,
    measure_parts_in_turns,
    measure_steps_in_turns,
    release,
)

SUITES = ("ops", "steps", "finetune")  # of "all"
Suite = Literal["ops", "steps", "finetune", "options", "hosts", "all"]

_OP_S, _STEP_S, _HOST_STEP_S = 4.0, 80.0, 60.0  # for all implementations of a case, which take turns
_ROUNDS, _QUICK_ROUNDS = (5, 9), (2, 3)  # of steps, the fewest and the most
_HOST_ROUNDS = (11, 15)  # small differences, whose median of few rounds says little


@dataclass(frozen=True)
class Options:
    """Size of the run."""

    suite: tuple[Suite, ...] = ("all",)
    """Which to run; "all" is without "options" and "hosts"."""
    checkouts: Path | None = None
    """Folder with mae, mae_st, VideoMAE, VideoMAEv2, AudioMAE and pixio, for the suite "hosts"."""
    quick: bool = False
    """Tiny sizes, to see that it works."""
    threads: int = 2
    """Threads of PyTorch; --quick takes one."""
    commit: str = ""
    """Commit that the rows name. If it is empty, git is asked."""
    output: Path | None = None
    """Folder for the rows; benchmarks/results, or a temporary one with --quick."""


Task = tuple[str, Callable[[], list[Row]]]  # a name, and a function that measures


def main(options: Options) -> None:
    """Checks, measures and prints each task's times."""
    start, others = time.perf_counter(), cpu_seconds_of_others()
    commit = options.commit or current_commit()  # before the rows of the last run are replaced
    # One thread for the smoke test, which has to be quick where other programs run too.
    torch.set_num_threads(1 if options.quick else options.threads)
    asked = [*(SUITES if "all" in options.suite else ()), *options.suite]
    suites = [suite for suite in dict.fromkeys(asked) if suite != "all"]
    facts = facts_of(CPU, commit)
    print(f"{facts.device}, torch {facts.torch}", flush=True)
    count = check_all(options, suites)  # tests/integrations/test_host_identity.py checks the hosts
    print(f"[{time.perf_counter() - start:4.0f} s] {count} cases correct", flush=True)
    folder = options.output or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)
    problems = []
    for suite in suites:
        with RowWriter(folder / f"{suite}_cpu.csv", Row) as writer:
            problems += run_all(make_tasks(suite, options, facts), writer, start)
    elapsed = time.perf_counter() - start
    print(f"rows of {', '.join(suites)} in {folder}, {elapsed:.0f} s")
    print(f"other programs took {(cpu_seconds_of_others() - others) / elapsed:.0%} of a core meanwhile")
    if problems:
        sys.exit("\n".join(problems))


def check_all(options: Options, suites: Sequence[str]) -> int:
    """Checks every case that has an official formulation; how many. Raises AssertionError where one fails."""
    ops = cpu.op_cases(options.quick) if "ops" in suites else ()
    groups = cpu.step_groups(options.quick) if "steps" in suites else []
    steps = {
        replace(case, clips=1, dtype=torch.float32)
        for group in groups
        for case in group
        if case.implementation == OFFICIAL
    }
    for op in ops:
        op.check(CPU)
    for step in steps:
        check_step(step, CPU)
        release(CPU)
    return len(ops) + len(steps)


def make_tasks(suite: str, options: Options, facts: Facts) -> Iterator[Task]:
    """The tasks of a suite."""
    quick = options.quick
    seconds = 0.5 if quick else _HOST_STEP_S if suite == "hosts" else _STEP_S
    rounds = _QUICK_ROUNDS if quick else _HOST_ROUNDS if suite == "hosts" else _ROUNDS
    if suite == "ops":
        for op in cpu.op_cases(quick):
            yield f"{op.op} {op.name}", partial(measure_op_in_turns, op, facts, 0.05 if quick else _OP_S)
    elif suite == "options":
        for name, steps in cpu.option_groups_of(quick).items():
            yield name, partial(measure_options_in_turns, name, steps, facts, seconds, rounds)
        for parts in cpu.part_groups(quick):
            yield parts[0].name, partial(measure_parts_in_turns, parts, facts, seconds / 2)
    else:
        groups: dict[str, Callable[[], Sequence[Sequence[AnyStep]]]] = {
            "steps": lambda: cpu.step_groups(quick),
            "finetune": lambda: [[cpu.QUICK_FINETUNE if quick else FinetuneStep(clips=2)]],
            "hosts": lambda: host_groups(options.checkouts, quick),
        }
        for group in groups[suite]():
            yield group[-1].name, partial(measure_steps_in_turns, group, suite, facts, seconds, rounds)


def run_all(tasks: Iterable[Task], writer: RowWriter[Row], start: float) -> list[str]:
    """Runs the tasks and returns the failures."""
    problems = []
    for name, task in tasks:
        found: list[Row] = []
        try:
            found = task()
        except Exception as error:  # the other cases are still worth their time; main exits with this one
            traceback.print_exc()
            problems.append(f"failed: {name}: {in_one_line(error)}")
        for row in found:
            writer.add(row)
        times = ", ".join(f"{row.implementation} {format_seconds(row.median_s)}" for row in found)
        print(f"[{time.perf_counter() - start:4.0f} s] {name}: {times}", flush=True)
        release(CPU)
    return problems


def cpu_seconds_of_others() -> float:
    """CPU seconds that programs outside this process group have used, for differences; 0 without a /proc to tell."""
    counts = Path("/proc/stat")
    if not counts.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts.read_text().split()[1:9])
    ours = sum(_ticks(entry) for entry in Path("/proc").glob("[0-9]*/stat"))
    return (user + nice + system + irq + softirq + steal - ours) / os.sysconf("SC_CLK_TCK")


def _ticks(stat: Path) -> int:
    """Clock ticks of a process and its ended children; 0 in another group. A `Worker` is of our group, and no child."""
    try:
        values = stat.read_text().rpartition(")")[2].split()  # a name may hold spaces and brackets
    except OSError:  # it has ended since
        return 0
    return sum(map(int, values[11:15])) if int(values[2]) == os.getpgrp() else 0


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
