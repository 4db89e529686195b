"""From a case to its rows: on a CPU the implementations in turns, elsewhere one after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.multiprocessing as mp

from adamae_sampler.attention import prefer_cudnn
from benchmarks.core.rows import COPY, OFFICIAL, OURS, PRODUCTS, Facts, Row, facts_of, make_row
from benchmarks.core.timing import (
    Call,
    Times,
    copy_calls,
    input_sets,
    peak_bytes,
    ratio,
    take_turns,
    time_alternated,
    time_events,
    time_graph,
    time_wall,
)
from benchmarks.ops.base import OpCase
from benchmarks.steps.options import Part
from benchmarks.steps.step import AnyStep, StepCase, check_step, cpu_clocks, finite, matrix_flops

_Found = TypeVar("_Found")

_PRODUCT = {"cpu": (3136, 768, 3072), "cuda": (8192, 8192, 8192)}  # rows, inner, columns: large enough for full rate
_TIMERS = {"events": time_events, "graph": time_graph, "wall": time_wall}


# ------------------------------------------------------------------------------------------------ one by one


@dataclass(frozen=True)
class Unit:
    """What is measured at a time: one implementation of one case, in each way that it can be timed.

    Attributes:
        suite: that it belongs to.
        case: an op at one size, or a training step.
        implementation: of an op; a step knows its own.
    """

    suite: str
    case: OpCase | AnyStep
    implementation: str = OURS

    @property
    def label(self) -> str:
        """The implementation's name in rows."""
        return self.implementation if isinstance(self.case, OpCase) else self.case.label

    @property
    def name(self) -> str:
        """The name that people read."""
        return f"{self.case.subject(self.suite).case}, {self.label}"

    def timings(self, device: torch.device) -> tuple[str, ...]:
        """How it is timed. The official code reads from the device, which no CUDA graph can hold."""
        if device.type == "cpu":
            return ("wall",)
        if self.label in (COPY, PRODUCTS):
            return ("graph",)
        ours = self.label.startswith(OURS) and getattr(self.case, "compiled", "") != "whole"
        return ("events", "graph") if ours else ("events",)


def measure(unit: Unit, timings: Sequence[str], device: torch.device, budget_s: float, commit: str) -> Iterator[Row]:
    """The rows of a unit, each as it comes; about `budget_s` seconds each.

    Raises:
        AssertionError: the package and the official code do not agree; nothing has been timed then.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)  # a rehearsal, which has to be quick where other programs run too
    facts, subject = facts_of(device, commit), unit.case.subject(unit.suite)
    with own_stream(device), prefer_cudnn():
        one = _measure_op if isinstance(unit.case, OpCase) else _measure_step
        for times, peak in one(unit, timings, device, budget_s):
            yield make_row(subject, unit.label, times, facts, peak_bytes=peak)
    release(device)


def _measure_op(
    unit: Unit, timings: Sequence[str], device: torch.device, budget_s: float
) -> Iterator[tuple[Times, int | None]]:
    case, name = unit.case, unit.implementation
    assert isinstance(case, OpCase)
    peak: int | None = None
    if name == COPY:
        calls = copy_calls(case.bytes, device)
    else:
        if name == OURS:
            case.check(device)
        first = case.inputs(device)
        sets = input_sets(sum(x.nbytes for x in first.values()), device)
        implementation = case.implementation(name)
        calls = [case.call(implementation, x) for x in (first, *(case.inputs(device) for _ in range(sets - 1)))]
        calls[0]()  # compiles, and fills what is cached
        peak = peak_bytes(calls[0], device)
    for timing in timings:
        yield _TIMERS[timing](calls, budget_s), peak


def _measure_step(
    unit: Unit, timings: Sequence[str], device: torch.device, budget_s: float
) -> Iterator[tuple[Times, int | None]]:
    case = unit.case
    assert not isinstance(case, OpCase)
    if isinstance(case, StepCase):
        if case.implementation == PRODUCTS:
            yield _products(case, device, _TIMERS[timings[0]], budget_s), None
            return
        if case.is_official_method:
            # At no more tokens than usual: the official formulation stores its scores, of 18,432 tokens 60 GB.
            size: dict[str, Any] = (
                {} if case.fixed_sampler().num_tokens <= 1568 else {"num_frames": 16, "img_size": 224}
            )
            one = replace(case, clips=1, dtype=torch.float32, compiled="", implementation=OFFICIAL, **size)
            _check_once(one, device)
    step = case.make(device)
    for _ in range(2):  # compiles, and makes the optimizer's state
        step()
    for timing in timings:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = _TIMERS[timing]([step], budget_s)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        finite(float(step()), case)
        yield times, peak


@cache  # what raises is not kept, and raises again
def _check_once(case: StepCase, device: torch.device) -> None:
    check_step(case, device)
    release(device)


def _products(case: StepCase, device: torch.device, timer: Callable[..., Times], budget_s: float) -> Times:
    """What the step's matrix products would take at the rate of one large product in its dtype."""
    rows, inner, columns = _PRODUCT[device.type]
    a, b = (torch.randn(shape, device=device, dtype=case.dtype) for shape in ((rows, inner), (inner, columns)))
    product = timer([lambda: torch.mm(a, b)], budget_s)
    products = matrix_flops(case, device) / (2 * rows * inner * columns)
    return Times(product.method, tuple(products * seconds for seconds in product.seconds))


# -------------------------------------------------------------------------------------------------- in turns


def measure_op_in_turns(case: OpCase, suite: str, facts: Facts, budget_s: float) -> list[Row]:
    """The rows of all implementations, which take turns on the CPU for about `budget_s` seconds."""
    device = torch.device("cpu")
    x = case.inputs(device)
    calls: dict[str, Call] = {COPY: copy_calls(case.bytes, device)[0]}
    calls |= {name: case.call(case.implementation(name), x) for name in (OURS, *case.baselines)}
    times = time_alternated(calls, budget_s)
    return [
        make_row(case.subject(suite), name, each, facts, copy=times[COPY], of_official=ratio(each, times[OFFICIAL]))
        for name, each in times.items()
    ]


def measure_steps_in_turns(
    group: Collection[AnyStep], suite: str, facts: Facts, budget_s: float, rounds: tuple[int, int]
) -> list[Row]:
    """The rows of steps that take turns, each in a process of its own; see `take_turns` for how often."""
    with cpu_clocks([case for case in group if case.implementation != PRODUCTS]) as clocks:
        for case in group:
            if isinstance(case, StepCase) and case.implementation == PRODUCTS:
                clocks[case] = _products_clock(case)
        times = take_turns(clocks, budget_s, rounds)
    official = {case.name: each for case, each in times.items() if case.implementation == OFFICIAL}
    return [
        make_row(
            case.subject(suite),
            case.label,
            each,
            facts,
            of_official=ratio(each, official[case.name]) if case.name in official else None,
        )
        for case, each in times.items()
    ]


def measure_options_in_turns(
    group: str, cases: Mapping[str, StepCase], facts: Facts, budget_s: float, rounds: tuple[int, int]
) -> list[Row]:
    """The rows of a group of options, named by the group and by what each step is there; they take turns."""
    with cpu_clocks(list(cases.values())) as clocks:
        times = take_turns(clocks, budget_s, rounds)
    first = times[next(iter(cases.values()))]
    return [
        make_row(
            replace(case.subject("options"), case=group), name, times[case], facts, of_first=ratio(times[case], first)
        )
        for name, case in cases.items()
    ]


def measure_parts_in_turns(parts: Sequence[Part], facts: Facts, budget_s: float) -> list[Row]:
    """The rows of the parts at one number of tokens, which take turns on the CPU."""
    calls: dict[str, Call] = {part.label: part.make() for part in parts}
    times = time_alternated(calls, budget_s, (3, 9))
    return [make_row(part.subject("options"), part.label, times[part.label], facts) for part in parts]


def _products_clock(case: StepCase) -> Callable[[], float]:
    """What the step's matrix products would take at the CPU's rate of the moment."""
    rows, inner, columns = _PRODUCT["cpu"]
    a, b = (torch.randn(shape, dtype=case.dtype) for shape in ((rows, inner), (inner, columns)))
    products = matrix_flops(case, torch.device("cpu")) / (2 * rows * inner * columns)

    def clock() -> float:
        return products * time_alternated({"product": lambda: torch.mm(a, b)}, 0.1)["product"].median

    return clock


# -------------------------------------------------------------------------------------------------- for both


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Makes this process's own CUDA stream the current one: the default stream cannot be captured into a graph."""
    return torch.cuda.stream(_stream()) if device.type == "cuda" else nullcontext()


def release(device: torch.device) -> None:
    """Gives back what a case has held, so that the next one finds the device as the first did."""
    torch._dynamo.reset()  # compiled code holds on to the model that it was compiled for
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_own_process(function: Callable[..., _Found], *args: object) -> _Found:
    """Calls a function in a fresh process; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()
