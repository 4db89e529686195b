"""Makes the tables of examples/README.md: what the paper's runs take at full scale, how they scale, how fast clips are
read, and the study of maskings.

    python benchmarks/report_examples.py            # each between the file's markers of its name

Hours are clips / (clips per second of one device), training steps alone: data loading and waiting for other devices
come on top. The pace is that of the rows in benchmarks/results; the paper's own is 168,913 clips of SSv2 in 9 min 11 s
on 8 GPUs (supplement, Table 4), data loading included. The study's tables are of the rows of downstream.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from downstream import downstream_table
from loader import loader_table
from report import insert
from rows import OURS, RESULTS, Row, read_rows, read_texts
from scaling import PAPER, Pace, scaling_table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from training.recipe import Recipe, load_preset
from training.schedule import Schedule

PROJECTION = "<!-- projection: begin -->", "<!-- projection: end -->"
SCALING = "<!-- scaling: begin -->", "<!-- scaling: end -->"
LOADER = "<!-- loader: begin -->", "<!-- loader: end -->"
DOWNSTREAM = "<!-- downstream: begin -->", "<!-- downstream: end -->"
CLIPS = {"ssv2": 168_913, "k400": 240_436, "ucf101": 9_537, "hmdb51": 3_570}  # training videos; split 1 of the last two
NAMES = {"ssv2": "SSv2", "k400": "Kinetics-400", "ucf101": "UCF101", "hmdb51": "HMDB51"}
_STEPS = {PretrainRecipe: "training step of ViT-B, adaptive 95%", FinetuneRecipe: "training step of ViT-B, fine-tuning"}
_STAGES: dict[type[Recipe], str] = {PretrainRecipe: "pre-training", FinetuneRecipe: "fine-tuning"}


@dataclass(frozen=True)
class Options:
    """What is read and written."""

    readme: Path = Path(__file__).parent.parent / "examples" / "README.md"
    """The file that gets the table."""
    results: Path = RESULTS
    """Folder of the rows."""


def fastest(results: Path, kind: type[Recipe]) -> Row | None:
    """The fastest measured training step of a stage, on a GPU if there are rows of one."""
    paths = [*results.glob("steps_*.csv"), *results.glob("finetune_*.csv")]
    rows = [row for path in sorted(paths) for row in read_rows(path, Row)]
    mine = [row for row in rows if row.op == _STEPS[kind] and row.implementation == OURS and row.clips_per_s]
    on_gpu = [row for row in mine if "NVIDIA" in row.device]
    return max(on_gpu or mine, key=lambda row: row.clips_per_s or 0.0, default=None)


def projection(results: Path) -> str:
    """A line for each data set and stage."""
    lines = [
        "| Run | steps | effective batch | learning rate | clips seen | hours of one device, measured pace | "
        "GPU-hours, the paper's pace |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for kind, stage in _STAGES.items():
        row = fastest(results, kind)
        for name, clips in CLIPS.items():
            recipe = load_preset(kind, name)
            schedule = Schedule.of(recipe, clips, 1)
            seen = schedule.steps * schedule.effective_batch * getattr(recipe, "repeats", 1)
            hours = f"{seen / row.clips_per_s / 3600:,.0f}" if row and row.clips_per_s else "not measured"
            paper = f"{seen / PAPER.clips_per_second / 3600:,.0f}" if kind is PretrainRecipe else ""
            lines.append(
                f"| {NAMES[name]}, {stage} | {schedule.steps:,} | {schedule.effective_batch} | {schedule.lr:.3g} | "
                f"{seen / 1e6:.1f} M | {hours} | {paper} |"
            )
        if row:
            notes.append(f"{stage} {row.clips_per_s:.3g} clips/s on {row.device} ({row.dtype}, commit {row.commit})")
    return "\n".join([*lines, "", f"Measured pace: {'; '.join(notes)}."])


def scaling(results: Path) -> str:
    """The efficiency on several GPUs, at the fastest measured pace and at the paper's."""
    row = fastest(results, PretrainRecipe)
    measured = [] if row is None else [Pace(row.clips_per_s or 0.0, row.clips, f"measured on {row.device}")]
    return scaling_table([*measured, PAPER])


def loader(results: Path) -> str:
    """The table of readers."""
    rows = read_texts(results / "loader_cpu.csv")
    first = rows[0]
    return f"{loader_table(rows)}\n\n{first['device']}, torch {first['torch']}, commit {first['commit']}."


def study(results: Path) -> str:
    """A table for each file of rows, under its settings; the first is the study itself."""
    parts = []
    for path in sorted(results.glob("downstream*.csv"), key=lambda path: (len(path.name), path.name)):
        rows = read_texts(path)
        first = rows[0]
        target = "normalised" if first["normalize_target"] == "True" else "raw"
        steps = max(int(row["pretrain_steps"]) for row in rows)
        parts += [
            f"{100 * float(first['mask_ratio']):g}% masked, {target} pixels, {steps} steps of pre-training, "
            f"{first['finetune_steps']} of fine-tuning with {first['labels']} labels, {first['probe_labels']} for the "
            f"probe; {len({row['seed'] for row in rows})} seeds",
            downstream_table(rows),
            f"`{path.name}`, {first['device']}, torch {first['torch']}, commit {first['commit']}.",
        ]
    return "\n\n".join(parts)


def main(options: Options) -> None:
    """Writes the tables."""
    text = options.readme.read_text(encoding="utf-8")
    text = insert(text, projection(options.results), options.readme, PROJECTION)
    text = insert(text, scaling(options.results), options.readme, SCALING)
    text = insert(text, loader(options.results), options.readme, LOADER)
    text = insert(text, study(options.results), options.readme, DOWNSTREAM)
    options.readme.write_text(text, encoding="utf-8")
    print(f"wrote {options.readme}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
