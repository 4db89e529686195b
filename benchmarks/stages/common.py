"""The settings that every stage gets, and the file of failures that all of them write."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.core.rows import RowWriter, device_slug, read_rows


@dataclass(frozen=True)
class Told:
    """The settings that every stage gets."""

    output: Path  # folder of the rows
    commit: str
    quick: bool
    device: torch.device  # the GPU; in a rehearsal without one, the CPU

    def file(self, name: str) -> Path:
        """The file of that name for this device."""
        return self.output / f"{name}_{device_slug(self.device)}.csv"


def parser(about: str | None) -> argparse.ArgumentParser:
    """The command line of a stage."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, required=True, help="folder of the rows")
    found.add_argument("--commit", default="unknown", help="what the rows name as the commit")
    found.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too: does it work?")
    return found


def told(given: argparse.Namespace) -> Told:
    """The settings of a parsed command line; ends the process without a GPU, unless the sizes are --quick."""
    if not (given.quick or torch.cuda.is_available()):
        sys.exit("no GPU that torch can use; --quick rehearses on a CPU, in tiny sizes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Told(given.output, given.commit, given.quick, device)


@dataclass(frozen=True)
class Failure:
    """A measurement that failed, and the reason in one line."""

    stage: str
    what: str
    error: str


class Failures:
    """Writes the failures of a stage, each when it comes, to the file that all stages share.

    Args:
        stage: its name; the failures of its last run are removed from the file.
        where: the settings.
    """

    def __init__(self, stage: str, where: Told) -> None:
        known = read_rows(where.file("failures"), Failure)
        self.before = {each.what for each in known if each.stage == stage}
        self.count = 0
        self._stage = stage
        self._writer = RowWriter(where.file("failures"), Failure, [each for each in known if each.stage != stage])

    def add(self, what: str, error: object) -> None:
        """Writes and prints one failure."""
        self.count += 1
        self._writer.add(Failure(self._stage, what, str(error)))
        print(f"FAILED {what}: {error}", flush=True)
