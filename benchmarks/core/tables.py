"""Tables of rows as Markdown: a column is a header and a function from a case to its cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.core.rows import Row, format_seconds

T = TypeVar("T")
Case = list[Row]  # the rows of one case
Column = tuple[str, Callable[[T], str]]


def table(columns: Sequence[Column[Any]], cases: Sequence[Any]) -> str:
    """Markdown, without the columns in which no case has anything; empty without cases."""
    if not cases:
        return ""
    filled = [(header, cells) for header, cell in columns if any(cells := [cell(case) for case in cases])]
    lines = [
        [header for header, _ in filled],
        ["---"] * len(filled),
        *zip(*(cells for _, cells in filled), strict=True),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone where all values are the same; empty without values."""
    if len(set(values)) < 2:
        return "".join(f"{value:.{digits}f}" for value in set(values))
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def source(rows: Sequence[Row] | Sequence[Mapping[str, str]]) -> str:
    """Device, versions and commits of rows, for a sentence."""
    texts = [row if isinstance(row, Mapping) else vars(row) for row in rows]
    devices, versions, threads, commits = (
        ", ".join(dict.fromkeys(str(text[name]) for text in texts if text.get(name)))
        for name in ("device", "torch", "threads", "commit")
    )
    counted = f", {threads} thread{'s' * (threads != '1')}" if threads else ""
    return f"{devices}, torch {versions}{counted}, commit {commits}"


def by_case(rows: Sequence[Row]) -> list[Case]:
    """The rows of each case together, cases in their first row's order."""
    return grouped(rows, lambda row: row.case)


def grouped(rows: Sequence[T], key: Callable[[T], object]) -> list[list[T]]:
    """The rows with the same key together, keys in their first row's order."""
    found: dict[object, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def seconds(row: Row | None) -> str:
    """The median, with a unit; empty without a row."""
    return format_seconds(row.median_s) if row else ""


def memory(row: Row | None) -> str:
    """The peak memory; empty without one."""
    return f"{row.peak_bytes / 1e9:.3g} GB" if row and row.peak_bytes is not None else ""


def rate(row: Row | None) -> str:
    """The clips a second; empty without them."""
    if row is None or row.clips_per_s is None:
        return ""
    return f"{row.clips_per_s:,.0f}" if row.clips_per_s >= 100 else f"{row.clips_per_s:.3g}"


def number(value: float | None, form: str) -> str:
    """A number as the form says; empty if there is none."""
    return "" if value is None else form.format(value)
