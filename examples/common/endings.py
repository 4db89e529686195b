"""How a training script ends early: with one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from common.interrupts import Interrupted
from common.video import VideoError


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, and from where it can be resumed."""


def run_to_the_end(train: Callable[[], None]) -> None:
    """Runs what a script is for; what ends it early is one line, without a traceback, and an exit code.

    128 + 15 is what a shell gives for SIGTERM, after which a scheduler may start the job again. SIGUSR1 would end the
    process where nobody waits for it, before and after training.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        train()
    except Interrupted:
        sys.exit(128 + 15)
    except (TrainingError, VideoError) as error:  # a process that reads puts its traceback before the message
        sys.exit(f"error: {str(error).rpartition('VideoError: ')[2].strip()}")
    except RuntimeError as error:
        # A DataLoader's words for a reader that is gone, raised wherever the main process is at that moment.
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.exit(
            f"error: a process that reads videos died ({error}) It may have run out of memory: try fewer --workers."
        )
