"""What each masking, and each option of the sampler, costs and gives: the same small pre-training, over several seeds.

    python -m benchmarks.study                                  # small clips, with a linear probe; half an hour
    python -m benchmarks.study --variants random exact scratch --finetune-steps 800 --output ...   # fine-tuned too
    python -m benchmarks.study --size medium --steps 200 --no-probe --output ...       # 512 tokens, adaptivity alone
    python -m benchmarks.study --budget time --output ...       # as many seconds as random masking takes for the steps
    python -m benchmarks.study --size real --no-probe ...       # the bundled video, for the loss alone
    python -m benchmarks.study --size tiny --normalize-target --steps 10000 --no-probe ...     # normalised targets
    python -m benchmarks.study --size gpu --jobs 1 --output ...                        # 1568 tokens, on a GPU

A row for each run: the time of a step relative to random masking, p(moving) / p(still), the share of visible tokens on
what moves, the reconstruction loss and error(moving) / error(still) on one set of random masks, and the accuracies of a
linear probe and of fine-tuning. Steps of all variants are timed in turns before anything is trained.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.core.commit import current_commit
from benchmarks.core.rows import RESULTS, read_rows, read_texts, write_rows
from benchmarks.pages.study import study_table
from benchmarks.studies.runs import Plan, Row, relative_step_times, run, run_all
from benchmarks.studies.variants import SCRATCH, VARIANTS, Size, variants_help


@dataclass(frozen=True)
class Options:
    """Size of the study."""

    variants: tuple[str, ...] = ("random", "tube", "frame", "exact", "fast")
    """The variants to compare, see above."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, masks and clips."""
    size: Size = "small"
    """Size of clips and model, see above."""
    steps: int = 4000
    """Optimiser steps of random masking."""
    budget: Literal["steps", "time"] = "steps"
    """What is equal: the number of steps, or their time."""
    mask_ratio: float | None = None
    """Share of tokens masked; that of the size if None."""
    normalize_target: bool = False
    """Normalised targets, as in the paper, or raw pixels."""
    probe: bool = True
    """Train a linear probe."""
    probe_labels: int = 4000
    """Number of labelled clips for it."""
    finetune_steps: int = 0
    """Optimiser steps of fine-tuning, 16 clips each; 0 fine-tunes nothing."""
    finetune_labels: int = 1000
    """Number of labelled clips for it."""
    test_clips: int = 2000
    """Clips for the accuracies, of a seed of their own."""
    jobs: int = 2
    """Runs at a time, each in one thread; on a GPU give 1."""
    output: Path = RESULTS / "study_cpu.csv"
    """CSV file for the rows. Rows that this study would not make again are never overwritten."""
    add: bool = False
    """Keep the rows that the file has, of the same settings, and do the runs that it lacks. Not with --budget time."""

    def __post_init__(self) -> None:
        if strangers := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"no variant {', '.join(strangers)}; there are {', '.join(VARIANTS)}.")
        for name in ("variants", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        for name in ("steps", "probe_labels", "finetune_labels", "test_clips", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 1 or more; --no-probe trains no probe.")
        if self.size == "real" and (self.probe or self.finetune_steps):
            raise ValueError("the bundled video has no labels: add --no-probe, and do not fine-tune.")
        if self.add and self.budget == "time":
            raise ValueError("--add: steps of equal time are measured anew in each study; use --budget steps.")

    @property
    def plan(self) -> Plan:
        """The part of the settings that every run needs."""
        return Plan(**{name: getattr(self, name) for name in Plan.__dataclass_fields__})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of each run."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


def rows_to_keep(options: Options) -> list[Row]:
    """The rows of the output with --add; raises ValueError for rows that would be lost, or are of other settings."""
    rows = read_rows(options.output, Row) if options.output.exists() else []
    equal = options.steps if options.budget == "steps" else None  # of equal time each variant has its own
    mine = options.size, options.budget, equal, options.normalize_target, options.probe
    for row in rows:
        its_equal = equal if row.variant == SCRATCH else row.steps if row.budget == "steps" else None
        its = row.size, row.budget, its_equal, row.normalize_target, row.probe_top1 is not None
        if its != mine:
            raise ValueError(
                f"{options.output} has a run of {row.variant} with (size, budget, steps, normalize_target, "
                f"probe) = {its}, and these are {mine}: give another --output."
            )
    if options.add:
        return rows
    if lost := [f"{row.variant} {row.seed}" for row in rows if (row.variant, row.seed) not in options.runs]:
        raise ValueError(
            f"{options.output} has runs that would be lost, since these do not repeat them: {', '.join(lost)}. "
            "--add keeps them; or give another --output."
        )
    return []


def main(options: Options) -> None:
    """Runs, writes each row as it comes, prints the table."""
    began, kept, plan = time.perf_counter(), rows_to_keep(options), options.plan
    relative, commit = relative_step_times(plan, options.variants), current_commit()
    with tempfile.TemporaryDirectory() as folder:
        done = {(row.variant, row.seed) for row in kept}
        runs = [each for each in options.runs if each not in done]
        calls = [(plan, variant, seed, relative[variant], folder, commit) for variant, seed in runs]
        write_rows(options.output, Row, itertools.chain(kept, run_all(run, calls, options.jobs)))
    print(study_table(read_texts(options.output)))
    print(f"{len(options.seeds)} seeds, {(time.perf_counter() - began) / 60:.1f} minutes; chance is 5%, 25% and 20%")


if __name__ == "__main__":
    about = "Variants, as options of pretrain.py; with R masks of each clip a step has R times fewer clips:"
    main(tyro.cli(Options, description=f"{__doc__}\n{about}\n\n{variants_help()}"))
