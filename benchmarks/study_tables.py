"""The study's rows as Markdown: a title, a table, and where the rows are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from studies import spread
from study_variants import TITLES, VARIANTS


def study_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Mean and standard deviation over the seeds of what a file's rows say, as Markdown."""
    columns = {
        "step_time": ("step, of random's", 2),
        "p_ratio": ("p(moving) / p(still)", 2),
        "visible_moving": ("visible tokens that move", 3),
        "reconstruction": ("loss on random masks", 4),
        "error_ratio": ("error(moving) / error(still)", 2),
        "probe_top1": ("probe: class", 1),
        "probe_direction": ("direction", 1),
        "probe_shape": ("shape", 1),
    }
    shown = {name: about for name, about in columns.items() if any(row.get(name) for row in rows)}
    lines = [
        f"| variant | steps | {' | '.join(title for title, _ in shown.values())} |",
        "| --- " * (len(shown) + 2) + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = [spread([float(row[name]) for row in mine if row[name]], digits) for name, (_, digits) in shown.items()]
        lines.append(f"| {variant} | {mine[0]['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def study_title(rows: Sequence[Mapping[str, str]]) -> str:
    """What the runs of a file have in common."""
    first = rows[0]
    target = "normalised" if first["normalize_target"] == "True" else "raw"
    equal = "as many steps" if first["budget"] == "steps" else "as much time"
    masked = ", ".join(dict.fromkeys(f"{100 * float(row['mask_ratio']):.3g}%" for row in rows)) + " masked"
    seeds = len({row["seed"] for row in rows})
    return f"{TITLES[first['size']]}, {masked}, {target} pixels, {equal} each, {seeds} seeds"


def study_facts(rows: Sequence[Mapping[str, str]], path: Path) -> str:
    """Where the rows are from, and what those variants are whose name does not say it."""
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    source = f"`{path.name}`, {first['device']}, torch {first['torch']}, commit {commits}."
    named = {name: VARIANTS[name] for name in dict.fromkeys(row["variant"] for row in rows)}
    told = [name for name, options in named.items() if options not in ([], ["--masking", name])]
    meant = "; ".join(f"{name} `{' '.join(named[name])}`" for name in told)
    return f"{source} Variants: {meant}." if meant else source
