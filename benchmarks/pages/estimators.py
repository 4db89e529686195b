"""The page of the estimators of the sampler's gradient, made of the rows of estimator_bias.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.core.rows import read_texts
from benchmarks.core.tables import Column, table

Texts = Mapping[str, str]


def estimators_page(results: Path) -> str:
    """Its one table; empty without rows."""
    rows = read_texts(results / "estimator_bias.csv")
    if not rows:
        return ""
    about = (
        "The expected gradient of each estimator beside the exact gradient of the expected error, by enumeration of "
        f"all masks of 2 of 6 tokens, commit {rows[0]['commit']}, `python -m benchmarks.estimator_bias`."
    )
    return "\n\n".join(["# Estimators", about, estimators_table(rows)])


def estimators_table(rows: Sequence[Texts]) -> str:
    """A line for each estimator under each kind of errors."""
    columns: list[Column[Texts]] = [
        ("errors", lambda row: row["errors"]),
        ("estimator", lambda row: row["estimator"]),
        ("cosine", lambda row: f"{float(row['cosine']):.2f} ± {float(row['cosine_deviation']):.2f}"),
        ("relative error", lambda row: f"{float(row['relative_error']):.2f}"),
    ]
    return table(columns, rows)
