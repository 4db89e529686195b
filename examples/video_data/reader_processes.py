"""DataLoaders of videos. Their reader processes leave signals to the main process."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

SIGNALS = [signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)


class ReaderSignals:
    """The signal handlers of a reader process. The main process still needs its readers after SIGTERM and SIGUSR1.

    A scheduler signals every process of a job, so a reader ignores SIGTERM at first. When the main process exits,
    multiprocessing sends SIGTERM to the remaining readers, and they obey.
    """

    def __init__(self) -> None:
        self._ending = multiprocessing.RawValue("b", 0)
        atexit.register(self._end)  # runs before multiprocessing's own exit handler, which was registered earlier

    def _end(self) -> None:
        self._ending.value = 1

    def __call__(self, _: int) -> None:
        """Sets the handlers. The DataLoader passes the number of the reader, which has no use here."""
        for number in SIGNALS:
            signal.signal(number, self._exit if number == signal.SIGTERM else signal.SIG_IGN)

    def _exit(self, _: int, __: FrameType | None) -> None:
        if self._ending.value:
            os._exit(0)


_READER_SIGNALS = ReaderSignals()


def read_batches(loader: DataLoader, workers: int) -> Generator[dict[str, Any], None, None]:
    """The batches of a loader, as a generator that always says when a reader died. Closing it ends the readers.

    This is no DataLoader of its own, since Accelerate makes another one of those that it prepares.

    Args:
        loader: one of `video_loader`, prepared by Accelerate or not.
        workers: its reader processes.

    Raises:
        RuntimeError: a reader died; the message begins with "DataLoader worker".
    """
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        # torch finds the death of a reader, unless it dies while it hands over a batch. An error of a video store
        # begins with "Caught", as torch hands on all errors of readers.
        if not workers or str(error).startswith("Caught"):
            raise
        raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}.") from error


def video_loader(
    dataset: Dataset[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    workers: int,
    **batching: Any,
) -> DataLoader:
    """A DataLoader over videos.

    Args:
        dataset: the videos.
        collate: joins the items of a batch.
        workers: reader processes; 0 reads in the main process.
        batching: `batch_size` or `batch_sampler`, as of a DataLoader.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_READER_SIGNALS,
        generator=torch.Generator(),  # keeps reading apart from the random numbers of masks and dropout
        **batching,
    )
