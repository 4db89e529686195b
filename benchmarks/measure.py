"""From a case to its rows: on a GPU one implementation after the other, on a CPU in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
import torch.multiprocessing as mp
from finetune_step import FinetuneStep
from op_base import CAPTURABLE, OpCase
from rows import COPY, OFFICIAL, OURS, PRODUCTS, RowWriter
from steps import AnyStep, StepCase, cpu_clocks, finite, matrix_flops
from timing import (
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
)

_Found = TypeVar("_Found")

_PRODUCT = {"cpu": (3136, 768, 3072), "cuda": (8192, 8192, 8192)}  # rows, inner, columns: large enough for full rate


def measure_op_cuda(case: OpCase, suite: str, writer: RowWriter, budget_s: float, names: Sequence[str]) -> None:
    """Writes the rows of the implementations named, each timed for about `budget_s` seconds in each way."""
    device = torch.device("cuda")
    subject = case.subject(suite)
    copy = time_graph(copy_calls(case.bytes, device), budget_s)
    first = case.inputs(device)
    sets = input_sets(sum(x.nbytes for x in first.values()), device)
    inputs = [first, *(case.inputs(device) for _ in range(sets - 1))]
    implementations = case.implementations(device)
    for name in names:
        if name == COPY:
            writer.add(subject, COPY, copy, copy=copy)
            continue
        calls = [case.call(implementations[name], x) for x in inputs]
        calls[0]()  # compiles, and fills what is cached
        peak = peak_bytes(calls[0])
        for timer in (time_events, time_graph) if name in CAPTURABLE else (time_events,):
            writer.add(subject, name, timer(calls, budget_s), copy=copy, peak_bytes=peak)


def measure_op_cpu(case: OpCase, suite: str, writer: RowWriter, budget_s: float) -> None:
    """Writes the rows of all implementations, which take turns for about `budget_s` seconds."""
    device = torch.device("cpu")
    x = case.inputs(device)
    calls: dict[str, Call] = {COPY: copy_calls(case.bytes, device)[0]}
    calls |= {name: case.call(each, x) for name, each in case.implementations(device).items()}
    times = time_alternated(calls, budget_s)
    for name, each in times.items():
        writer.add(case.subject(suite), name, each, copy=times[COPY], of_official=ratio(each, times[OFFICIAL]))


def measure_step_cuda(case: StepCase | FinetuneStep, suite: str, writer: RowWriter, budget_s: float) -> None:
    """Writes the rows of one step: by events, and by graph replay for ours unless it is compiled."""
    if isinstance(case, StepCase) and case.implementation == PRODUCTS:
        writer.add(case.subject(suite), PRODUCTS, _products_cuda(case, budget_s))
        return
    run: Callable[..., list[tuple[Times, int]]] = in_own_process if case.repository else _call
    for times, peak in run(_time_step_cuda, case, budget_s):
        writer.add(case.subject(suite), case.label, times, peak_bytes=peak)


def measure_steps_cpu(
    group: Sequence[AnyStep], suite: str, writer: RowWriter, budget_s: float, rounds: tuple[int, int]
) -> None:
    """Writes the rows of steps that take turns, each in a process of its own; see `take_turns` for how often."""
    with cpu_clocks([case for case in group if case.implementation != PRODUCTS]) as clocks:
        for case in group:
            if isinstance(case, StepCase) and case.implementation == PRODUCTS:
                clocks[case] = _products_clock(case)
        times = take_turns(clocks, budget_s, rounds)
    official = {case.name: each for case, each in times.items() if case.implementation == OFFICIAL}
    for case, each in times.items():
        of_official = ratio(each, official[case.name]) if case.name in official else None
        writer.add(case.subject(suite), case.label, each, of_official=of_official)


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


def _call(function: Callable[..., _Found], *args: object) -> _Found:
    return function(*args)


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _time_step_cuda(case: StepCase | FinetuneStep, budget_s: float) -> list[tuple[Times, int]]:
    device = torch.device("cuda")
    found = []
    with own_stream(device):
        step = case.make(device)
        for _ in range(2):  # compiles, and makes the optimizer's state
            step()
        capturable = case.implementation == OURS and not case.compiled
        for timer in (time_events, time_graph) if capturable else (time_events,):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            times = timer([step], budget_s)
            found.append((times, torch.cuda.max_memory_allocated()))
        finite(float(step()), case)
    return found


def _products_cuda(case: StepCase, budget_s: float) -> Times:
    """What the step's matrix products would take at the rate of one large product in its dtype."""
    device = torch.device("cuda")
    rows, inner, columns = _PRODUCT["cuda"]
    a, b = (torch.randn(shape, device=device, dtype=case.dtype) for shape in ((rows, inner), (inner, columns)))
    product = time_graph([lambda: torch.mm(a, b)], budget_s)
    products = matrix_flops(case, device) / (2 * rows * inner * columns)
    return Times(product.method, tuple(products * seconds for seconds in product.seconds))


def _products_clock(case: StepCase) -> Callable[[], float]:
    """The same on a CPU, at the rate of the moment."""
    rows, inner, columns = _PRODUCT["cpu"]
    a, b = (torch.randn(shape, dtype=case.dtype) for shape in ((rows, inner), (inner, columns)))
    products = matrix_flops(case, torch.device("cpu")) / (2 * rows * inner * columns)

    def clock() -> float:
        return products * time_alternated({"product": lambda: torch.mm(a, b)}, 0.1)["product"].median

    return clock
