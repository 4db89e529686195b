"""How long calls take: on a GPU by graph replay and by events, on a CPU by alternating what is compared.

A GPU runs behind the program that feeds it. "events" times what a caller sees, launches and waits included: repeated
calls between two CUDA events. "graph" times the device alone: many calls are captured into one CUDA graph, whose
replays launch nothing from Python. So it resolves an op of microseconds. Code that reads from the device cannot be
captured. On a CPU ("alternated") the implementations take turns call by call, A B C then C B A, since other programs
change the machine's speed; ratios are taken within a round. "wall" times one after the other on a CPU, for rehearsals
of the GPU's benchmarks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

_WARM_UP_S = 0.1  # the clocks of an idle GPU are low
_REPEAT_S = 4e-3  # the least that a repeat should last, so that the events' own time does not count
_LONG_REPEAT_S = 0.5  # the most that a repeat may last to take every input once
_MAX_CALLS = 512  # in one repeat
_REPEATS = (5, 200)  # of a measurement on a GPU
_ROUNDS = (5, 200)  # on a CPU
_SHORT_S = 5e-4  # a CPU call below this is repeated within its turn


@dataclass(frozen=True)
class Times:
    """Seconds of one call, a number for each repeat, and how they were taken."""

    method: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile."""
        q1, _, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, q3


def ratio(ours: Times, theirs: Times) -> float:
    """Median of ours / theirs: by round where they took turns, else of their medians."""
    if ours.method == theirs.method == "alternated":
        return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))
    return ours.median / theirs.median


def time_graph(calls: Sequence[Call], budget_s: float) -> Times:
    """Device seconds of one call, from replays of a CUDA graph of many.

    Args:
        calls: the same call on different inputs, taken in turn. None may read from the device.
        budget_s: about how long to measure.

    The current stream must be the one that everything ran on so far, and not the default stream: a backward pass
    runs where its forward pass ran, and the default stream cannot be captured.
    """
    count = _calls_in_a_repeat(calls, _warm_up(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            calls[i % len(calls)]()
    return Times("graph", _repeat(graph.replay, count, budget_s))


def time_events(calls: Sequence[Call], budget_s: float) -> Times:
    """Seconds of one call as its caller sees them, from repeated calls between CUDA events. Arguments as above."""
    count = _calls_in_a_repeat(calls, _warm_up(calls))

    def run() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    return Times("events", _repeat(run, count, budget_s))


def time_wall(calls: Sequence[Call], budget_s: float) -> Times:
    """Seconds of one call on a CPU, which does not run behind its caller. Arguments as above."""
    calls[0]()  # not timed: it sets up caches
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds) < budget_s and len(seconds) < _REPEATS[1]):
        seconds.append(_wall(calls[len(seconds) % len(calls)]))
    return Times("wall", tuple(seconds))


def time_alternated(calls: dict[str, Call], budget_s: float, rounds: tuple[int, int] = _ROUNDS) -> dict[str, Times]:
    """Seconds of one call of each, on the CPU, taking turns. Arguments as `take_turns` has them."""
    clocks: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        call()  # not timed: it sets up caches
        clocks[name] = partial(_wall, call, max(1, math.ceil(_SHORT_S / max(_wall(call), 1e-9))))
    return take_turns(clocks, budget_s, rounds)


def take_turns(
    clocks: dict[Name, Callable[[], float]], budget_s: float, rounds: tuple[int, int] = _ROUNDS
) -> dict[Name, Times]:
    """Calls every clock once a round, in an order that reverses each time. A clock returns the seconds that it found.

    Args:
        clocks: what takes turns.
        budget_s: no further round begins after this many seconds.
        rounds: the fewest, whatever the time, and the most; one more goes first and does not count.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in clocks}
    start = time.perf_counter()
    for i in range(rounds[1] + 1):
        if i > rounds[0] and time.perf_counter() - start > budget_s:
            break
        for name in list(clocks)[:: -1 if i % 2 else 1]:
            seconds[name].append(clocks[name]())
    return {name: Times("alternated", tuple(each[1:])) for name, each in seconds.items()}


def copy_calls(num_bytes: int, device: torch.device) -> list[Call]:
    """Device copies that move `num_bytes`, read and written ones together: the pace of memory."""
    half = max(num_bytes // 2, 1)
    calls: list[Call] = []
    for _ in range(input_sets(half, device)):
        source = torch.randint(256, (half,), dtype=torch.uint8, device=device)
        calls.append(partial(torch.empty_like(source).copy_, source))
    return calls


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Makes this process's own CUDA stream the current one: the default stream cannot be captured into a graph."""
    return torch.cuda.stream(_stream()) if device.type == "cuda" else nullcontext()


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def input_sets(num_bytes: int, device: torch.device) -> int:
    """The number of input sets of this size that take turns, so that no input is still in a GPU's cache."""
    return min(_MAX_CALLS, math.ceil(4 * _cache_bytes(device) / num_bytes)) if device.type == "cuda" else 1


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call takes at its peak, beyond what is held already; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


@cache
def _cache_bytes(device: torch.device) -> int:
    found: int = torch.cuda.get_device_properties(device).L2_cache_size
    return found


def _warm_up(calls: Sequence[Call]) -> float:
    """Seconds of one call, after whatever the first ones compile, and after the device's clocks are up."""
    calls[0]()
    torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - start < _WARM_UP_S:
        calls[done % len(calls)]()
        torch.cuda.synchronize()
        done += 1
    return (time.perf_counter() - start) / done


def _calls_in_a_repeat(calls: Sequence[Call], seconds: float) -> int:
    every_input_once = len(calls) if seconds * len(calls) < _LONG_REPEAT_S else 1
    return min(_MAX_CALLS, max(every_input_once, math.ceil(_REPEAT_S / seconds)))


def _repeat(run: Call, count: int, budget_s: float) -> tuple[float, ...]:
    def synchronized() -> None:
        run()
        torch.cuda.synchronize()

    synchronized()
    once = _wall(synchronized)
    repeats = min(max(int(budget_s / once), _REPEATS[0]), _REPEATS[1])
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) * 1e-3 / count for start, end in events)


def _wall(call: Call, count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
