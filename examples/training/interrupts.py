"""Interruptions of a run: requests to save or to stop, on which all processes agree, and errors that end a run."""

from __future__ import annotations

import enum
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from video_data.reader_processes import SIGNALS
from video_data.video_files import VideoError


class Request(enum.IntEnum):
    """A request to a run. The largest of several requests counts."""

    NONE = 0
    SAVE = 1
    STOP = 2  # save, then end


class Interrupted(Exception):
    """A signal stopped the run; the run is saved."""


class TrainingError(RuntimeError):
    """A run cannot go on. The message says why, and which checkpoint can be resumed."""


class Interrupts:
    """A context in which SIGTERM means save and stop, and SIGUSR1 means save. A clock asks to save too.

    Processes agree over the CPU (gloo), one step behind. After each step a process sends its own request and receives
    the agreed request of the previous step. So no process waits for a device, and all act after the same step.

    Args:
        minutes: time between two requests of the clock.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._save = self._stop = False  # signal handlers set them at any time
        self._saved_at = time.monotonic()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None
        self._sent: tuple[Any, torch.Tensor] | None = None  # the running reduction, and its result
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None and self._sent is not None:
            self._sent[0].wait()

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._stop = True
        else:
            self._save = True

    def after_step(self) -> Request:
        """The request that all processes agreed on; each process calls this once after every step."""
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
        if self._sent is not None:
            work, place = self._sent
            work.wait()
            agreed = Request(int(place))
        place = torch.tensor(int(mine))
        self._sent = dist.all_reduce(place, dist.ReduceOp.MAX, self._group, async_op=True), place
        return agreed

    def saved(self) -> None:
        """Restarts the clock after a checkpoint."""
        self._saved_at = time.monotonic()


def run_to_the_end(run: Callable[[], None]) -> None:
    """Runs a script's work. An early end prints one line without a traceback and sets an exit code.

    128 + 15 is the exit code that a shell gives for SIGTERM; a scheduler may then start the job again. SIGUSR1 is
    ignored before and after training, where its default action would end the process.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        run()
    except Interrupted:
        sys.exit(128 + signal.SIGTERM)
    except (TrainingError, VideoError) as error:  # an error of a reader process has its traceback before the message
        sys.exit(f"error: {str(error).rpartition('VideoError: ')[2].strip()}")
    except RuntimeError as error:
        # A DataLoader raises this when a reader dies, in whatever line the main process is.
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(f"error: a reader process died ({error}) It may have run out of memory: try fewer --workers.")
