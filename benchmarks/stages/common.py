"""What every stage is told, and the files that they share."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.core.rows import RowWriter, device_slug, kept_rows


@dataclass(frozen=True)
class Told:
    """What a stage is told.

    Attributes:
        output: folder of the rows.
        commit: that they name.
        quick: tiny sizes.
        device: the GPU; in a rehearsal without one, the CPU.
    """

    output: Path
    commit: str
    quick: bool
    device: torch.device

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
    """From a parsed command line; ends the process where there is no GPU and none of the sizes is for a CPU."""
    if not (given.quick or torch.cuda.is_available()):
        sys.exit("no GPU that torch can use; --quick rehearses on a CPU, in tiny sizes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Told(given.output, given.commit, given.quick, device)


@dataclass(frozen=True)
class Failure:
    """Something that could not be measured, and why, in one line."""

    stage: str
    what: str
    error: str


class Failures:
    """The failures of a stage's run, in the file of all stages', each written when it comes.

    Args:
        stage: whose last failures are gone from the file once this run begins.
        where: the file is.
    """

    def __init__(self, stage: str, where: Told) -> None:
        known = kept_rows(where.file("failures"), Failure)
        self.before = {each.what for each in known if each.stage == stage}
        self.count = 0
        self._stage = stage
        self._writer = RowWriter(where.file("failures"), Failure, [each for each in known if each.stage != stage])

    def add(self, what: str, error: object) -> None:
        """Writes and prints one failure."""
        self.count += 1
        self._writer.add(Failure(self._stage, what, str(error)))
        print(f"FAILED {what}: {error}", flush=True)
