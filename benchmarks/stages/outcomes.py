"""A pytest plugin that writes each test's outcome as a row when it comes, and passes over what has passed before.

    python -m pytest -p benchmarks.stages.outcomes --outcomes runs/gpu tests/ops/test_kernels.py

A run that was cut short goes on with what is left; tests that failed run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.core.rows import RowWriter, device_slug, read_rows


@dataclass(frozen=True)
class Outcome:
    """How a test ended. A test may have several rows, of which the last counts."""

    test: str  # its node id
    outcome: str  # "passed", "failed" or "skipped"
    seconds: float
    message: str  # the first line of the error's
    torch: str


def outcomes_file(folder: Path) -> Path:
    """The file of the outcomes."""
    return folder / f"tests_{device_slug(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}.csv"


def last_outcomes(rows: Iterable[Outcome]) -> list[Outcome]:
    """The row of each test that counts."""
    return list({each.test: each for each in rows}.values())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option --outcomes."""
    parser.addoption("--outcomes", type=Path, required=True, help="folder of the rows")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the recorder, which reads the known outcomes."""
    path = outcomes_file(config.getoption("--outcomes"))
    config.pluginmanager.register(Recorder(path, is_worker=hasattr(config, "workerinput")))


class Recorder:
    """Deselects tests that have passed, and writes rows in the process that all reports come to.

    Args:
        path: of the rows.
        is_worker: whether this is one of pytest-xdist's workers.
    """

    def __init__(self, path: Path, is_worker: bool) -> None:
        known = last_outcomes(read_rows(path, Outcome))
        self.done = {each.test for each in known if each.outcome != "failed"}
        # Failures stay until their tests run again: another stage's may not be among those that run now.
        self.writer = None if is_worker else RowWriter(path, Outcome, known)
        self.ran = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects tests that have passed."""
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
        items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Writes the row of a test that has ended."""
        self.ran = True
        if self.writer is None or (report.when != "call" and report.outcome == "passed"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.outcome != "failed" else crash.message if crash else str(report.longrepr)
        first = next(iter(message.splitlines()), "")[:300]
        self.writer.add(Outcome(report.nodeid, report.outcome, report.duration, first, torch.__version__))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Makes a session in which nothing was left to run a success."""
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done and not self.ran:
            session.exitstatus = pytest.ExitCode.OK
