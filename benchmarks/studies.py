"""What the studies share: runs in processes of their own, and means with deviations over the seeds."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def run_all(run: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """The results of run(*call), in order, so many at a time, with a bar of progress."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(run, *call) for call in calls]
        for task in tqdm(tasks, unit="run"):
            yield task.result()


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone where all are the same, and nothing of none."""
    if len(set(values)) < 2:
        return "".join(f"{value:.{digits}f}" for value in set(values))
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
