"""The page of the studies, made of the rows of study.py and estimator_bias.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.core.rows import read_texts
from benchmarks.core.tables import Column, grouped, source, spread, table
from benchmarks.studies.variants import TITLES, VARIANTS

Texts = Mapping[str, str]

_COLUMNS = {  # of the rows: header, digits
    "step_time": ("step, of random's", 2),
    "p_ratio": ("p(moving) / p(still)", 2),
    "visible_moving": ("visible tokens that move", 3),
    "reconstruction": ("loss on random masks", 4),
    "error_ratio": ("error(moving) / error(still)", 2),
    "probe_top1": ("probe: class", 1),
    "probe_direction": ("direction", 1),
    "probe_shape": ("shape", 1),
    "finetune_top1": ("fine-tuned: class", 1),
    "finetune_direction": ("direction", 1),
    "finetune_shape": ("shape", 1),
}


def study_page(results: Path) -> str:
    """A table for each file of rows, and that of the estimators; empty without rows of a study."""
    parts = []
    for path in sorted(results.glob("study*.csv"), key=lambda path: (len(path.name), path.name)):
        rows = read_texts(path)
        parts += [f"## {study_title(rows)}", study_table(rows), study_facts(rows, path)]
    if not parts:
        return ""
    about = "Small models pre-trained with each masking; mean ± standard deviation over the seeds; commands below."
    return "\n\n".join([f"# Study\n\n{about}", *parts, *_estimators(results)])


def study_table(rows: Sequence[Texts]) -> str:
    """Mean and standard deviation over the seeds of what a file's rows say, as Markdown."""
    variants = grouped(rows, lambda row: row["variant"])
    columns: list[Column[Sequence[Texts]]] = [(name, partial(_first, name)) for name in ("variant", "steps")]
    columns += [(header, partial(_spread, name, digits)) for name, (header, digits) in _COLUMNS.items()]
    return table(columns, variants)


def _first(name: str, rows: Sequence[Texts]) -> str:
    return rows[0][name]


def _spread(name: str, digits: int, rows: Sequence[Texts]) -> str:
    return spread([float(row[name]) for row in rows if row.get(name)], digits)


def study_title(rows: Sequence[Texts]) -> str:
    """The settings that the runs of a file share."""
    first = rows[0]
    target = "normalised" if first["normalize_target"] == "True" else "raw"
    equal = "as many steps" if first["budget"] == "steps" else "as much time"
    masked = ", ".join(dict.fromkeys(f"{100 * float(row['mask_ratio']):.3g}%" for row in rows)) + " masked"
    seeds = len({row["seed"] for row in rows})
    return f"{TITLES[first['size']]}, {masked}, {target} pixels, {equal} each, {seeds} seeds"


def study_facts(rows: Sequence[Texts], path: Path) -> str:
    """The source of the rows, and the options of those variants whose name does not say them."""
    parts = [f"`{path.name}`: {source(rows)}, `{_command(rows)}`."]
    named = {name: VARIANTS[name] for name in dict.fromkeys(row["variant"] for row in rows)}
    told = [name for name, options in named.items() if options not in ([], ["--masking", name])]
    if told:
        parts.append(f"Variants: {'; '.join(f'{name} `{chr(32).join(named[name])}`' for name in told)}.")
    return " ".join(parts)


def estimators_table(rows: Sequence[Texts]) -> str:
    """A line for each estimator under each kind of errors."""
    columns: list[Column[Texts]] = [
        ("errors", lambda row: row["errors"]),
        ("estimator", lambda row: row["estimator"]),
        ("cosine", lambda row: f"{float(row['cosine']):.2f} ± {float(row['cosine_deviation']):.2f}"),
        ("relative error", lambda row: f"{float(row['relative_error']):.2f}"),
    ]
    return table(columns, rows)


def _command(rows: Sequence[Texts]) -> str:
    first = rows[0]
    command = ["python -m benchmarks.study --variants", *dict.fromkeys(row["variant"] for row in rows)]
    command += ["--size", first["size"]]
    command += ["--budget time"] if first["budget"] == "time" else ["--steps", first["steps"]]
    if first["size"] == "small" and (ratio := max(float(row["mask_ratio"]) for row in rows)) > 0.875:
        command.append(f"--mask-ratio {ratio:.3g}")
    command += ["--normalize-target"] * (first["normalize_target"] == "True")
    command += ["--finetune-steps", first["finetune_steps"]] if first.get("finetune_steps") else []
    return " ".join([*command, *["--no-probe"] * (not first["probe_top1"])])


def _estimators(results: Path) -> list[str]:
    rows = read_texts(results / "estimator_bias.csv")
    if not rows:
        return []
    about = (
        "The expected gradient of each estimator beside the exact gradient of the expected error, by enumeration of "
        f"all masks of 2 of 6 tokens, commit {rows[0]['commit']}, `python -m benchmarks.estimator_bias`."
    )
    return ["## Estimators", about, estimators_table(rows)]
