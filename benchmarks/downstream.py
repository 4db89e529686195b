"""Does adaptive masking give better features? Pre-training, probing and fine-tuning on `sprites`, for every masking.

    python benchmarks/downstream.py            # under 30 minutes on two CPU cores

Runs examples/pretrain.py, linear_probe.py and finetune.py with the same budget for each masking and seed, and tunes
from scratch beside them. Clips for pre-training, labelled clips and test clips are different ones. Prints mean and
standard deviation over the seeds; a row for each run goes into a CSV file.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from commit import current_commit
from rows import device_name, read_texts, write_rows
from studies import run_all, spread

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from video_data.sprites import DIRECTIONS

Start = Literal["adaptive", "random", "tube", "frame", "scratch"]


@dataclass(frozen=True)
class Options:
    """Size of the study."""

    starts: tuple[Start, ...] = ("adaptive", "random", "tube", "frame", "scratch")
    """What is compared; 'scratch' is an encoder without pre-training, probed and fine-tuned as it is."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, masks, and of the clips for pre-training and training."""
    pretrain_steps: int = 4000
    """Optimiser steps of pre-training, 16 clips each."""
    finetune_steps: int = 800
    """Optimiser steps of fine-tuning, 16 clips each."""
    labels: int = 1000
    """Labelled clips for fine-tuning."""
    probe_labels: int = 4000
    """Labelled clips for the linear probe."""
    test_clips: int = 2000
    """Clips for the accuracies, of a seed of their own."""
    mask_ratio: float = 0.875
    """Share of tokens masked in pre-training. 8 of 64 are then visible with adaptive, random and tube masks alike;
    frame masks show 16, one of 4 time steps."""
    normalize_target: bool = False
    """Normalised targets, as in the paper, or raw pixels."""
    jobs: int = 2
    """Runs at a time, each in one thread; on a GPU give 1."""
    output: Path = Path(__file__).parent / "results" / "downstream_cpu.csv"
    """CSV file for the rows."""


@dataclass(frozen=True)
class Row:
    """One run."""

    start: str
    seed: int
    pretrain_steps: int
    finetune_steps: int
    labels: int
    probe_labels: int
    mask_ratio: float
    normalize_target: bool
    reconstruction: float | None  # mean of the last steps of pre-training
    probe_top1: float  # percent, as the next five
    probe_direction: float
    probe_shape: float
    finetune_top1: float
    finetune_direction: float
    finetune_shape: float
    pretrain_seconds: float  # in one of `jobs` processes
    seconds: float
    device: str
    torch: str
    commit: str


def run(options: Options, start: Start, seed: int, folder: str, commit: str) -> Row:
    """Pre-trains, probes and fine-tunes once; `commit` is the code's, for the row."""
    began = time.perf_counter()
    import finetune
    import linear_probe
    import pretrain
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // options.jobs, 1))
    place = Path(folder) / f"{start}-{seed}"
    place.mkdir(parents=True)
    weights = place / "pretrain" / "model.safetensors"
    common = ["--seed", str(seed), "--workers", "0"]
    labelled, test = f"sprites:{{}}:{1000 + seed}", f"sprites:{options.test_clips}:5000"
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        untrained = start == "scratch"  # one step at learning rate 0 writes the weights that a run starts from
        pace = (
            ["--steps", "1", "--base-lr", "0", "--min-base-lr", "0"]
            if untrained
            else ["--steps", str(options.pretrain_steps)]
        )
        target = "--normalize-target" if options.normalize_target else "--no-normalize-target"
        settings = ["--preset", "sprites", "--masking", "random" if untrained else start, target, *pace, *common]
        settings += ["--mask-ratio", str(options.mask_ratio), "--data", f"sprites:8000:{seed}"]
        pretrain.main([*settings, "--output", str(weights.parent)])
        pretrain_seconds = time.perf_counter() - began
        lines = (weights.parent / "metrics.jsonl").read_text().splitlines()
        reconstruction = None if untrained else json.loads(lines[-1])["reconstruction"]
        data = ["--train", labelled.format(options.probe_labels), "--val", test, "--cache", str(place / "cache")]
        settings = ["--checkpoint", str(weights), "--batch-size", "100", "--output", str(place / "probe")]
        linear_probe.main([*settings, *data, *common])
        settings = ["--preset", "sprites", "--train", labelled.format(options.labels), "--val", test]
        settings += ["--checkpoint", str(weights), "--steps", str(options.finetune_steps), *common]
        finetune.main([*settings, "--output", str(place / "finetune")])
    return Row(
        start, seed, options.pretrain_steps if start != "scratch" else 0, options.finetune_steps, options.labels,
        options.probe_labels, options.mask_ratio, options.normalize_target, reconstruction,
        *accuracies(place / "probe" / "predictions.csv"), *accuracies(place / "finetune" / "predictions.csv"),
        pretrain_seconds, time.perf_counter() - began, device_name(device), torch.__version__, commit,
    )  # fmt: skip


def accuracies(predictions: Path) -> tuple[float, float, float]:
    """Percent of clips whose class, direction and shape are right; a class is shape * 4 + direction."""
    with predictions.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["label"]), int(row["first five classes"].split()[0])) for row in csv.DictReader(file)]
    right = [(a == b, a % DIRECTIONS == b % DIRECTIONS, a // DIRECTIONS == b // DIRECTIONS) for a, b in rows]
    of_class, of_direction, of_shape = (100 * sum(column) / len(rows) for column in zip(*right, strict=True))
    return of_class, of_direction, of_shape


def downstream_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Mean and standard deviation over the seeds of what a file's rows say, as Markdown."""
    columns = ["probe_top1", "probe_direction", "probe_shape", "finetune_top1", "finetune_direction", "finetune_shape"]
    lines = [
        "| pre-training | linear probe: class | direction | shape | fine-tuned: class | direction | shape | "
        "reconstruction |",
        "| --- |" + " --- |" * 7,
    ]
    for start in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == start]
        spreads = [spread([float(row[name]) for row in mine], 1) for name in columns]
        losses = [float(row["reconstruction"]) for row in mine if row["reconstruction"]]
        lines.append(f"| {start} | {' | '.join(spreads)} | {f'{statistics.mean(losses):.4f}' if losses else ''} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Runs, writes rows as they come, prints the table."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        commit = current_commit()
        calls = [(options, start, seed, folder, commit) for seed in options.seeds for start in options.starts]
        write_rows(options.output, Row, run_all(run, calls, options.jobs))
    print(downstream_table(read_texts(options.output)))
    print(f"{len(options.seeds)} seeds, {(time.perf_counter() - began) / 60:.1f} minutes; chance is 5%, 25% and 20%")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
