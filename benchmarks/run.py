"""Runs the benchmarks: first checks that everything compared gives the same, then times it.

    python benchmarks/run.py                             # ops, training steps and sweeps, on the GPU if there is one
    python benchmarks/run.py --suite ops --device cpu
    python benchmarks/run.py --suite steps --official ~/adamae     # beside the official code itself
    python benchmarks/run.py --suite finetune                       # a step of the classifier
    python benchmarks/run.py --suite hosts --budget 1000           # patched beside unpatched models
    python benchmarks/run.py --quick                     # tiny sizes, to see that it works

Rows go to benchmarks/results/{ops,steps,finetune,sweep,hosts}_{cpu,<gpu>}.csv as they are measured; `report.py` makes
tables and plots of them. A check that fails ends the run before any time is taken; a case that cannot be measured is
reported at the end, and so is what the time did not allow. CPU times need an idle machine, since
threads that wait for each other lose milliseconds at a time to any other program; what others used is printed last.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import cases
import torch
import tyro
from finetune_step import FinetuneStep
from host_steps import host_groups
from measure import (
    in_own_process,
    measure_op_cpu,
    measure_op_cuda,
    measure_step_cuda,
    measure_steps_cpu,
    own_stream,
    release,
)
from official_repository import repository_name
from op_base import OpCase
from rows import (
    COMPILED,
    COPY,
    OFFICIAL,
    OURS,
    PRODUCTS,
    RESULTS,
    TORCH_BACKEND,
    Row,
    RowWriter,
    current_commit,
    device_name,
    device_slug,
    find,
    format_seconds,
)
from steps import StepCase, check_step

from adamae_sampler import ops

SUITES = ("ops", "sweep", "steps", "finetune")  # of "all"; "hosts" is asked for by name


class Budget(NamedTuple):
    """Seconds for a measurement of an op and of a step, and rounds of steps; on a CPU for all that take turns."""

    op: float
    step: float
    step_rounds: tuple[int, int] = (4, 9)


_BUDGETS = {"cpu": Budget(op=4.0, step=80.0), "cuda": Budget(op=0.3, step=1.2)}
_QUICK_BUDGET = Budget(op=0.05, step=0.5, step_rounds=(2, 3))
_HOST_STEP_S = 45.0
_COMPILE_OP_S, _COMPILE_STEP_S = 10.0, 60.0  # about what torch.compile takes on a GPU machine


@dataclass(frozen=True)
class Options:
    """What is run."""

    suite: tuple[Literal["ops", "steps", "finetune", "sweep", "hosts", "all"], ...] = ("all",)
    """Which parts; "hosts" times patched models beside unpatched ones on a CPU and is not in "all"."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto takes a GPU if there is one."""
    official: tuple[Path, ...] = ()
    """Checkouts of github.com/wgcban/adamae or github.com/MCG-NJU/VideoMAE, whose steps are timed too."""
    checkouts: Path | None = None
    """Folder with checkouts of research code in mae, mae_st, VideoMAE, VideoMAEv2, for the suite "hosts"."""
    quick: bool = False
    """Tiny sizes: does it work?"""
    budget: float = 460.0
    """Seconds after which nothing more is started; what takes long to compile comes last."""
    threads: int = 2
    """Threads of PyTorch on a CPU; --quick takes one."""
    commit: str = ""
    """What the rows name as the commit; git is asked if this is empty."""
    output: Path | None = None
    """Folder for the rows; benchmarks/results if none is given, or a temporary one with --quick."""


@dataclass(frozen=True)
class Task:
    """Something to measure, and about how long it compiles before its first number, in seconds."""

    name: str
    suite: str
    run: Callable[[], None]
    compile_s: float = 0.0


def main(options: Options) -> None:
    """Checks, measures, and prints a table."""
    start, others = time.perf_counter(), cpu_seconds_of_others()
    commit = options.commit or current_commit()  # before the rows of the last run are replaced
    for path in options.official:
        repository_name(path)  # raises, before anything has been waited for
    device = torch.device(_kind(options))
    if device.type == "cpu":
        # One for the smoke test, which has to be quick where other programs run too.
        torch.set_num_threads(1 if options.quick else options.threads)
    suites: list[str] = [suite for suite in SUITES if suite in options.suite or "all" in options.suite]
    if "hosts" in options.suite:
        if device.type != "cpu":
            sys.exit('the suite "hosts" is timed on a CPU: add --device cpu.')
        suites.append("hosts")
    backend = ops.backend_for(torch.empty(1, device=device))
    print(f"{device_name(device)}, torch {torch.__version__}, ops by {backend}", flush=True)
    with ExitStack() as stack:
        stack.enter_context(own_stream(device))
        count = check_all(options, suites, device)
        if suites != ["hosts"]:  # which tests/test_host_identity.py checks
            print(f"[{time.perf_counter() - start:4.0f} s] {count} cases correct", flush=True)
        folder = options.output or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)
        files = {suite: folder / f"{suite}_{device_slug(device)}.csv" for suite in suites}
        writers = {suite: stack.enter_context(RowWriter(file, device, commit)) for suite, file in files.items()}
        tasks = [task for suite in suites for task in make_tasks(suite, options, writers[suite], device)]
        problems = run_all(tasks, options, writers, device, start)
    if rows := [row for suite, writer in writers.items() if suite != "hosts" for row in writer.rows]:
        print_table(rows)
    elapsed = time.perf_counter() - start
    print(f"rows in {', '.join(map(str, files.values()))}, {elapsed:.0f} s")
    print(f"other programs took {(cpu_seconds_of_others() - others) / elapsed:.0%} of a core meanwhile")
    if problems:
        sys.exit("\n".join(problems))


def check_all(options: Options, suites: Sequence[str], device: torch.device) -> int:
    """Checks every op case, and every baseline of a step; how many. Raises AssertionError where one fails."""
    op_cases: list[OpCase] = []
    steps: list[StepCase] = []
    if "ops" in suites:
        op_cases += cases.op_cases(device, options.quick)
    if "sweep" in suites:
        op_cases += cases.sweep_op_cases(device, options.quick)
    if "steps" in suites:
        groups = cases.step_groups(device, options.quick, options.official)
        known = [case for group in groups for case in group if isinstance(case, StepCase)]
        baselines = [case for case in known if case.implementation not in (OURS, PRODUCTS)]
        steps += [replace(case, clips=1, dtype=torch.float32, compiled=False) for case in baselines]
    for op in dict.fromkeys(op_cases):
        op.check(device)
        release(device)
    for step in dict.fromkeys(steps):
        # The repositories' code takes over names of modules, so it gets a process of its own.
        in_own_process(check_step, step, device) if step.repository else check_step(step, device)
        release(device)
    return len(dict.fromkeys(op_cases)) + len(dict.fromkeys(steps))


def make_tasks(suite: str, options: Options, writer: RowWriter, device: torch.device) -> Iterator[Task]:
    """What there is to measure in a suite."""
    budget = _QUICK_BUDGET if options.quick else _BUDGETS[device.type]
    op_cases = {"ops": cases.op_cases, "sweep": cases.sweep_op_cases}
    for op in op_cases[suite](device, options.quick) if suite in op_cases else ():
        name = f"{op.op} {op.name}"
        if device.type == "cpu":
            yield Task(name, suite, partial(measure_op_cpu, op, suite, writer, budget.op))
            continue
        measure = partial(measure_op_cuda, op, suite, writer, budget.op)
        yield Task(name, suite, partial(measure, (COPY, OFFICIAL, TORCH_BACKEND, OURS)))
        if op.compile_official:
            yield Task(f"{name}, {COMPILED}", suite, partial(measure, (COMPILED,)), compile_s=_COMPILE_OP_S)
    groups: list[cases.StepGroup] = []
    if suite == "steps":
        groups = cases.step_groups(device, options.quick, options.official)
    if suite == "finetune":
        groups = cases.finetune_groups(device, options.quick)
    if device.type == "cpu" and suite != "hosts":
        for group in groups:
            run = partial(measure_steps_cpu, group, suite, writer, budget.step, budget.step_rounds)
            yield Task(group[-1].name, suite, run)
        return
    if suite == "hosts":
        for pair in host_groups(options.checkouts, options.quick):
            run = partial(measure_steps_cpu, pair, suite, writer, _HOST_STEP_S, budget.step_rounds)
            yield Task(pair[0].name, suite, run)
        return
    steps: list[StepCase | FinetuneStep] = [case for group in groups for case in group]
    if suite == "sweep":
        steps += cases.sweep_step_cases(device, options.quick)
    for step in steps:
        run = partial(measure_step_cuda, step, suite, writer, budget.step)
        yield Task(f"{step.name}, {step.label}", suite, run, compile_s=_COMPILE_STEP_S if step.compiled else 0.0)


def run_all(
    tasks: Sequence[Task], options: Options, writers: Mapping[str, RowWriter], device: torch.device, start: float
) -> list[str]:
    """Runs the tasks, those that compile for long last; what failed, and what there was no time for."""
    problems = []
    for task in sorted(tasks, key=lambda task: task.compile_s):
        if time.perf_counter() - start + task.compile_s > options.budget:
            problems.append(f"no time left for: {task.name}")
            continue
        before = len(writers[task.suite].rows)
        try:
            task.run()
        except Exception as error:  # the other cases are still worth the machine's time; main exits with this one
            traceback.print_exc()
            problems.append(f"failed: {task.name}: {type(error).__name__}: {error}")
        found = (
            f"{row.implementation} {format_seconds(row.median_s)}{' by graph' if row.timing == 'graph' else ''}"
            for row in writers[task.suite].rows[before:]
        )
        print(f"[{time.perf_counter() - start:4.0f} s] {task.name}: {', '.join(found)}", flush=True)
        release(device)
    return problems


def print_table(rows: Sequence[Row]) -> None:
    """A line for each case: our time as its caller sees it and by graph, and the official code's.

    Then the ratio of the first to the last, and a device copy's time over our best.
    """
    cases_of_rows = list(dict.fromkeys((row.suite, row.case) for row in rows))
    width = max((len(case) for _, case in cases_of_rows), default=0)
    print(f"\n{'':{width}s} {'ours':>8s} {'by graph':>8s} {'official':>8s} {'ratio':>5s} of copy")
    for suite, case in cases_of_rows:
        of_case = [row for row in rows if (row.suite, row.case) == (suite, case)]
        ours, by_graph, official = find(of_case, OURS), find(of_case, OURS, graph=True), find(of_case, OFFICIAL)
        times = " ".join(f"{format_seconds(row.median_s) if row else '':>8s}" for row in (ours, by_graph, official))
        best = by_graph or ours
        ratio = f"{ours.of_official:.2f}" if ours and ours.of_official is not None else ""
        of_copy = f"{best.fraction_of_copy:.2f}" if best and best.fraction_of_copy is not None else ""
        print(f"{case:{width}s} {times} {ratio:>5s} {of_copy:>7s}")


def cpu_seconds_of_others() -> float:
    """CPU seconds that other programs have used, for differences; 0 where there is no /proc/stat to tell."""
    counts = Path("/proc/stat")
    if not counts.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])  # less this process and its children


def _kind(options: Options) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
