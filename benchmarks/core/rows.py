"""The rows of measurements: what each holds, and the CSV files that they are written to as they are measured."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.core.timing import Times

RESULTS = Path(__file__).parent.parent / "results"
T = TypeVar("T")
OURS = "adamae_sampler"
OFFICIAL, COMPILED = "official", "official compiled"
COPY, PRODUCTS = "device copy", "matrix products alone"  # the bounds of an op and of a step


@dataclass(frozen=True)
class Subject:
    """The case of a measurement: the fields of a row that all implementations of a case share."""

    suite: str
    case: str
    op: str  # or "training step"
    direction: str  # "forward", "backward", "forward+backward", or "step"
    clips: int
    tokens: int
    visible: int
    dtype: str  # of the inputs; of a step, the one that it computes in
    width: int | None = None  # values of a token
    shape: str = ""  # of the tokens or scores, B x N x D; of a step's video, frames x height x width
    bytes: int | None = None  # the fewest that must move, read and written


@dataclass(frozen=True)
class Facts:
    """The machine and the versions of a run."""

    device: str
    threads: int  # of PyTorch on the CPU
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class Row(Subject, Facts):
    """One measurement. An empty field does not apply.

    Attributes:
        implementation: "adamae_sampler", "official", "official compiled", "device copy", ...
        timing: "graph", "events", "alternated" or "wall", see timing.py.
        median_s: seconds of one call; the next four are of the same repeats.
        fraction_of_copy: seconds of a device copy that moves as many bytes, over median_s, where both took turns;
            `of_copy` gives it for any row.
        of_official: median_s over that of "official", by round, where both took turns; `of_official` gives it for any.
        of_first: median_s over that of the first step of its group, by round, where the steps of a group took turns.
        peak_bytes: device memory at its peak: of an op, beyond its inputs; of a step, in all.
    """

    implementation: str
    timing: str
    median_s: float
    min_s: float | None
    q1_s: float
    q3_s: float
    max_s: float | None
    repeats: int
    fraction_of_copy: float | None = None
    of_official: float | None = None
    of_first: float | None = None
    peak_bytes: int | None = None
    clips_per_s: float | None


def facts_of(device: torch.device, commit: str) -> Facts:
    """The facts of this process."""
    return Facts(device_name(device), torch.get_num_threads(), torch.__version__, version_of("triton"), commit)


def make_row(subject: Subject, implementation: str, times: Times, facts: Facts, **others: Any) -> Row:
    """The row of a measurement; `others` are the fields that have defaults."""
    q1, q3 = times.quartiles
    return Row(
        **vars(subject),
        **vars(facts),
        implementation=implementation,
        timing=times.method,
        median_s=times.median,
        min_s=min(times.seconds),
        q1_s=q1,
        q3_s=q3,
        max_s=max(times.seconds),
        repeats=len(times.seconds),
        clips_per_s=subject.clips / times.median,
        **others,
    )


class RowWriter(Generic[T]):
    """Writes rows of a dataclass to a CSV file, each when it comes, so that a run cut short keeps what it has.

    Args:
        path: the file; one of an earlier run is replaced.
        kind: the dataclass.
        keep: rows that the file starts with.
    """

    def __init__(self, path: Path, kind: type[T], keep: Iterable[T] = ()) -> None:
        self.rows = list(keep)
        self._names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")  # kept rows are in one of both files at any time
        self._file = partial.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerow(self._names)
        self._csv.writerows(map(self._texts, self.rows))
        self._file.flush()
        partial.replace(path)

    def __enter__(self) -> RowWriter[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: T) -> None:
        """Writes one row."""
        self.rows.append(row)
        self._csv.writerow(self._texts(row))
        self._file.flush()

    def _texts(self, row: T) -> list[str]:
        return [_text(getattr(row, name)) for name in self._names]


def find(rows: Iterable[Row], implementation: str, graph: bool = False) -> Row | None:
    """The first row of an implementation that was timed by graph replay, or otherwise."""
    found = (row for row in rows if row.implementation == implementation and (row.timing == "graph") == graph)
    return next(found, None)


def of_official(row: Row, case: Iterable[Row]) -> float | None:
    """Its time over the official formulation's, timed in the same way; None if the case has no such row."""
    if row.of_official is not None:
        return row.of_official
    official = find(case, OFFICIAL)
    return row.median_s / official.median_s if official and official.timing == row.timing else None


def of_copy(row: Row, case: Iterable[Row]) -> float | None:
    """A device copy's time for the bytes of the case, over the row's; None if no copy was timed."""
    if row.fraction_of_copy is not None:
        return row.fraction_of_copy
    copies = [each.median_s for each in case if each.implementation == COPY]
    return min(copies) / row.median_s if copies else None


def write_rows(path: Path, kind: type[T], rows: Iterable[T]) -> None:
    """Writes rows of a dataclass, each when it comes."""
    with RowWriter(path, kind) as writer:
        for row in rows:
            writer.add(row)


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The rows that `RowWriter` wrote to a file; none if there is no file.

    Columns that came later are None in the rows of an earlier file, where None is allowed: they were not measured.

    Raises:
        ValueError: the file has a column that `kind` lacks, or lacks one that `kind` needs.
    """
    types = {each.name: str(each.type) for each in fields(kind)}  # type: ignore[arg-type]
    rows = read_texts(path)
    found = set(rows[0]) if rows else set(types)
    needed = {name for name, its_type in types.items() if "None" not in its_type}
    if wrong := sorted((found - set(types)) | (needed - found)):
        raise ValueError(f"{path} has other columns than {kind.__name__}, which differs in {', '.join(wrong)}.")
    return [kind(**{name: _value(its_type, row.get(name, "")) for name, its_type in types.items()}) for row in rows]


def read_texts(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as texts; none if there is no file. A last line that was cut short is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def device_name(device: torch.device) -> str:
    """The name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def device_slug(device: torch.device) -> str:
    """The device's name in file names: "cpu", or a GPU's name such as "nvidia_h200"."""
    return "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def format_seconds(seconds: float) -> str:
    """Seconds as text, with three digits and a unit: "12.3 µs"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            break
    return f"{seconds / scale:.3g} {unit}"


def _value(kind: str, text: str) -> Any:
    if not text and "None" in kind:
        return None
    if kind == "bool":
        return text == "True"
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def version_of(package: str) -> str:
    """The installed version of a package; empty if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
