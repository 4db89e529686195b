"""Requests to save or to stop, from signals and the clock, on which all processes of a run agree."""

from __future__ import annotations

import atexit
import enum
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


class Request(enum.IntEnum):
    """What a run is asked for; of several the largest counts."""

    NONE = 0
    SAVE = 1
    STOP = 2  # save, then end


class Interrupted(Exception):
    """A run that ended because it was told to; the message says where it goes on."""


SIGNALS = [signal.SIGTERM]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    SIGNALS.append(signal.SIGUSR1)


class Interrupts:
    """A context in which SIGTERM means save and stop, SIGUSR1 save, and so does the clock every so many minutes.

    Processes agree over the CPU (gloo), one step behind: each passes on what it was asked for after a step and learns
    of the previous step's, so that nobody waits for a device, and all act after the same step.

    Args:
        minutes: between two savings by the clock.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._save = self._stop = False  # set by handlers, which may run between any two lines below
        self._saved_at = time.monotonic()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._told: tuple[Any, torch.Tensor] | None = None  # a reduction on its way, and its place
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None and self._told is not None:
            self._told[0].wait()

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._stop = True
        else:
            self._save = True

    def after_step(self) -> Request:
        """What all processes do now; each calls this once after every step."""
        mine = Request.NONE
        if self._save or time.monotonic() - self._saved_at >= self._seconds:
            self._save = False
            self._saved_at = time.monotonic()
            mine = Request.SAVE
        if self._stop:
            mine = Request.STOP
        if self._group is None:
            return mine
        agreed = Request.NONE
        if self._told is not None:
            work, place = self._told
            work.wait()
            agreed = Request(int(place))
        place = torch.tensor(int(mine))
        self._told = dist.all_reduce(place, dist.ReduceOp.MAX, self._group, async_op=True), place
        return agreed

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved_at = time.monotonic()


class Readers:
    """Called first in each process that reads data: signals are for the main process, which still needs the readers.

    A scheduler signals every process of a job. SIGTERM counts for a reader only once the main process is about to exit,
    when multiprocessing sends it to those that are left.
    """

    def __init__(self) -> None:
        self._ending = multiprocessing.RawValue("b", 0)
        atexit.register(self._end)  # before multiprocessing's own, which was registered when it was imported

    def _end(self) -> None:
        self._ending.value = 1

    def __call__(self, _: int) -> None:
        """Takes the number of the reader, which does not matter."""
        for number in SIGNALS:
            signal.signal(number, self._exit if number == signal.SIGTERM else signal.SIG_IGN)

    def _exit(self, _: int, __: FrameType | None) -> None:
        if self._ending.value:
            os._exit(0)


READERS = Readers()
