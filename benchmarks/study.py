"""The cost and the features of each masking: the same small pre-training, over several seeds.

    python -m benchmarks.study                                  # small clips, with a linear probe; half an hour
    python -m benchmarks.study --variants random exact scratch --finetune-steps 800 --output ...   # fine-tuned too
    python -m benchmarks.study --size medium --steps 200 --no-probe --output ...       # 512 tokens, adaptivity alone
    python -m benchmarks.study --budget time --output ...       # as many seconds as random masking takes for the steps
    python -m benchmarks.study --size real --no-probe ...       # the bundled video, for the loss alone
    python -m benchmarks.study --size tiny --normalize-target --steps 10000 --no-probe ...     # normalised targets
    python -m benchmarks.study --size gpu --jobs 1 --output ...                        # 1568 tokens, on a GPU

A row for each run: the time of a step relative to random masking, p(moving) / p(still), the share of visible tokens
that move, the reconstruction loss and error(moving) / error(still) on one set of random masks, and the accuracies of a
linear probe and of fine-tuning. Steps of all variants are timed in turns before anything is trained.
"""

from __future__ import annotations

import itertools
import tempfile
import time

import tyro

from benchmarks.core.commit import current_commit
from benchmarks.core.rows import read_rows, read_texts, write_rows
from benchmarks.pages.study import study_table
from benchmarks.studies.runs import Options, Row, relative_step_times, run, run_all
from benchmarks.studies.variants import SCRATCH, variants_help


def rows_to_keep(options: Options) -> list[Row]:
    """The rows of the output with --add; raises ValueError for rows that would be lost, or are of other settings."""
    rows = read_rows(options.output, Row)
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
    began, kept = time.perf_counter(), rows_to_keep(options)
    relative, commit = relative_step_times(options), current_commit()
    with tempfile.TemporaryDirectory() as folder:
        done = {(row.variant, row.seed) for row in kept}
        runs = [each for each in options.runs if each not in done]
        calls = [(options, variant, seed, relative[variant], folder, commit) for variant, seed in runs]
        write_rows(options.output, Row, itertools.chain(kept, run_all(run, calls, options.jobs)))
    print(study_table(read_texts(options.output)))
    print(f"{len(options.seeds)} seeds, {(time.perf_counter() - began) / 60:.1f} minutes; chance is 5%, 25% and 20%")


if __name__ == "__main__":
    about = "Variants, as options of pretrain.py; with R masks of each clip a step has R times fewer clips:"
    main(tyro.cli(Options, description=f"{__doc__}\n{about}\n\n{variants_help()}"))
