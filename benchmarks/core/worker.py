"""A process that measures one thing after another, and is replaced when one of them fails.

A failed measurement may leave behind memory, a stream that is still being captured, or a device that refuses all
further work. All of that ends with its process, and so costs no other measurement.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")
_ROW, _DONE, _FAILED = "row", "done", "failed"
_MOST_LETTERS = 300  # of an error, which goes into a cell of a table


class WorkFailed(Exception):
    """A measurement raised, its process ended, or its time was over; the message says so in one line."""


class Worker:
    """Runs generator functions in a process of its own, which starts with the first of them.

    A server that has imported the function's module forks the process, so that a replacement starts at once. The server
    never uses a GPU, which a forked process could not use after it.
    """

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._line: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def stream(self, function: Callable[..., Iterator[T]], *args: Any, limit_s: float | None) -> Iterator[T]:
        """What `function(*args)` yields. The function goes on when the next result is asked for.

        Args:
            function: a generator function that a fresh process can import.
            args: its arguments, which are pickled.
            limit_s: seconds that it may take from one result to the next; None for any.

        Raises:
            WorkFailed: it raised, its process ended, or it took longer. The next call gets a fresh process.
        """
        line = self._start(function.__module__)
        try:
            line.send((function, args))
            while True:
                if not line.poll(limit_s):
                    raise WorkFailed(f"took over {limit_s:.0f} s")
                kind, found = line.recv()
                if kind == _FAILED:
                    raise WorkFailed(found)
                if kind == _DONE:
                    return
                yield found
                line.send("next")
        except (EOFError, ConnectionError) as error:
            raise WorkFailed(f"its process ended ({self._how_it_ended()})") from error
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Ends the process, if there is one, at once."""
        if self._process is not None and self._line is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
        self._process = self._line = None

    def _start(self, module: str) -> Connection:
        if self._line is None:
            context = mp.get_context("forkserver")
            context.set_forkserver_preload([module])
            line, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            self._process, self._line = process, line
            theirs.close()  # so that the end of the process ends the wait for it
        return self._line

    def _how_it_ended(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        self.end()
        return f"by signal {-code}" if code < 0 else f"with code {code}"


def _serve(line: Connection) -> None:
    while True:
        try:
            function, args = line.recv()
        except EOFError:  # the process that asks has ended
            return
        try:
            for found in function(*args):
                line.send((_ROW, found))
                line.recv()
            line.send((_DONE, None))
        except BaseException as error:  # the process that asks raises it as WorkFailed
            traceback.print_exc()
            line.send((_FAILED, in_one_line(error)))


def in_one_line(error: BaseException) -> str:
    """An error's kind and the beginning of its message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
