"""From a case to its rows: on a CPU the implementations take turns, on a GPU they follow each other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from adamae_sampler.attention import prefer_cudnn
from benchmarks.core.rows import COPY, OFFICIAL, OURS, PRODUCTS, Facts, Row, facts_of, make_row
from benchmarks.core.timing import (
    Call,
    Times,
    copy_calls,
    input_sets,
    own_stream,
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
from benchmarks.steps.step import AnyStep, StepCase, check_step, cpu_clocks, matrix_flops, require_finite

_PRODUCT = {"cpu": (3136, 768, 3072), "cuda": (8192, 8192, 8192)}  # rows, inner, columns: large enough for full rate
_TIMERS = {"events": time_events, "graph": time_graph, "wall": time_wall}


# ------------------------------------------------------------------------------------------------ one by one


@dataclass(frozen=True)
class Unit:
    """One implementation of one case, in each way that it can be timed."""

    suite: str
    case: OpCase | AnyStep
    implementation: str = OURS  # of an op; a step knows its own

    @property
    def label(self) -> str:
        """The implementation's name in rows."""
        return self.implementation if isinstance(self.case, OpCase) else self.case.label

    @property
    def name(self) -> str:
        """The name that people read."""
        return f"{self.case.subject(self.suite).case}, {self.label}"

    def timings(self, device: torch.device) -> tuple[str, ...]:
        """The ways of timing it. The official code reads from the device, which no CUDA graph can hold."""
        if device.type == "cpu":
            return ("wall",)
        if self.label in (COPY, PRODUCTS):
            return ("graph",)
        ours = self.label.startswith(OURS) and getattr(self.case, "compiled", "") != "whole"
        return ("events", "graph") if ours else ("events",)


def measure(unit: Unit, timings: Sequence[str], device: torch.device, budget_s: float, commit: str) -> Iterator[Row]:
    """The rows of a unit, each as it comes; about `budget_s` seconds each.

    Raises:
        AssertionError: the package and the official code do not agree. It comes before anything is timed.
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
        require_finite(float(step()), case)
        yield times, peak


@cache  # an exception is not kept: the check that failed runs again
def _check_once(case: StepCase, device: torch.device) -> None:
    check_step(case, device)
    release(device)


def _products(case: StepCase, device: torch.device, timer: Callable[..., Times], budget_s: float) -> Times:
    """The time of the step's matrix products at the rate of one large product in its dtype."""
    call, count = _one_product(case, device)
    product = timer([call], budget_s)
    return Times(product.method, tuple(count * seconds for seconds in product.seconds))


def _one_product(case: StepCase, device: torch.device) -> tuple[Call, float]:
    """A large product, and how many of it have as many operations as the step's matrix products."""
    rows, inner, columns = _PRODUCT[device.type]
    a, b = (torch.randn(shape, device=device, dtype=case.dtype) for shape in ((rows, inner), (inner, columns)))
    return lambda: torch.mm(a, b), matrix_flops(case, device) / (2 * rows * inner * columns)


# -------------------------------------------------------------------------------------------------- in turns


CPU = torch.device("cpu")


def measure_op_in_turns(case: OpCase, facts: Facts, budget_s: float) -> list[Row]:
    """The rows of all implementations, which take turns on the CPU for about `budget_s` seconds."""
    x = case.inputs(CPU)
    calls: dict[str, Call] = {COPY: copy_calls(case.bytes, CPU)[0]}
    calls |= {name: case.call(case.implementation(name), x) for name in (OURS, *case.baselines)}
    times = time_alternated(calls, budget_s)
    return [
        make_row(
            case.subject("ops"),
            name,
            each,
            facts,
            fraction_of_copy=times[COPY].median / each.median,
            of_official=ratio(each, times[OFFICIAL]),
        )
        for name, each in times.items()
    ]


def measure_steps_in_turns(
    group: Sequence[AnyStep], suite: str, facts: Facts, budget_s: float, rounds: tuple[int, int]
) -> list[Row]:
    """The rows of steps that take turns, each in a process of its own; see `take_turns` for how often."""
    times = _steps_in_turns(group, budget_s, rounds)
    first = next(iter(times.values()))
    official = {case.name: each for case, each in times.items() if case.implementation == OFFICIAL}
    of_official = {case: ratio(each, official[case.name]) for case, each in times.items() if case.name in official}
    return [
        make_row(
            case.subject(suite),
            case.label,
            each,
            facts,
            of_official=of_official.get(case),
            of_first=ratio(each, first) if suite == "hosts" else None,
        )
        for case, each in times.items()
    ]


def measure_options_in_turns(
    group: str, cases: Mapping[str, StepCase], facts: Facts, budget_s: float, rounds: tuple[int, int]
) -> list[Row]:
    """The rows of a group of options, with the group as the case and the step's name in it as the implementation."""
    times = _steps_in_turns(list(cases.values()), budget_s, rounds)
    first = times[next(iter(cases.values()))]
    return [
        make_row(
            replace(case.subject("options"), case=group), name, times[case], facts, of_first=ratio(times[case], first)
        )
        for name, case in cases.items()
    ]


def measure_parts_in_turns(parts: Sequence[Part], facts: Facts, budget_s: float) -> list[Row]:
    """The rows of the parts at one number of tokens, which take turns on the CPU."""
    times = time_alternated({part.implementation: part.make() for part in parts}, budget_s, (3, 9))
    return [make_row(each.subject("options"), each.implementation, times[each.implementation], facts) for each in parts]


def _steps_in_turns(group: Sequence[AnyStep], budget_s: float, rounds: tuple[int, int]) -> dict[AnyStep, Times]:
    products = [case for case in group if isinstance(case, StepCase) and case.implementation == PRODUCTS]
    with cpu_clocks([case for case in group if case not in products]) as clocks:
        return take_turns({**clocks, **{case: _products_clock(case) for case in products}}, budget_s, rounds)


def _products_clock(case: StepCase) -> Callable[[], float]:
    """The time of the step's matrix products at the CPU's rate of the moment."""
    call, count = _one_product(case, CPU)
    return lambda: count * time_alternated({"product": call}, 0.1)["product"].median


# -------------------------------------------------------------------------------------------------- for both


def release(device: torch.device) -> None:
    """Gives back the memory of a case, so that the next one finds the device as the first did."""
    torch._dynamo.reset()  # compiled code holds on to the model that it was compiled for
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
