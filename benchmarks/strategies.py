"""Does showing the encoder what moves make better features? Masking strategies against each other, with statistics.

    python benchmarks/strategies.py                              # the question: random, exact and motion, 5 seeds
    python benchmarks/strategies.py --arms tube frame block      # further arms, added to the rows that there are
    python benchmarks/strategies.py --rows FILE --table          # the table of a file of rows, and nothing else
    python benchmarks/strategies.py --size smoke --rows FILE     # would it work?

Trains tiny masked autoencoders on generated clips in which one object moves, and reads from their frozen features what
moves. Runs that have their rows are passed over, so the same command goes on after an interruption. What is asked, on
which data, and what was fixed beforehand: benchmarks/masking/README.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare checkout is not installed

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from benchmarks.core.commit import current_commit
from benchmarks.core.rows import RESULTS, RowWriter, read_rows
from benchmarks.masking.arms import ARMS, PRIMARY, SEEDS, SETTINGS
from benchmarks.masking.run import Row, Task, finished, run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SETTINGS, default="cpu", help="of clips, steps and batch (cpu)")
    add("--arms", nargs="+", choices=ARMS, default=PRIMARY, metavar="ARM", help=f"some of: {', '.join(ARMS)}")
    add("--seeds", type=int, nargs="+", default=SEEDS, help="of encoder, clips and masks (0 to 4)")
    add("--steps", type=int, help="optimiser steps, if not those of the size")
    add("--lr", type=float, nargs="+", help="learning rates, if not that of the size")
    add("--mask-ratio", type=float, nargs="+", help="masking ratios, if not that of the size")
    add("--raw", action="store_true", help="raw pixels as targets, not normalised ones")
    add("--rows", type=Path, help="CSV file (benchmarks/results/strategies_SIZE.csv)")
    add("--jobs", type=int, default=0, help="runs at a time, if several each in one thread (a CPU's cores; 1 on a GPU)")
    add("--table", action="store_true", help="print the tables of the rows, and run nothing")
    add("--rows-only", action="store_true", help="print no table, which needs scipy and matplotlib")
    add("--commit", default="", help="what the rows name as the commit; git is asked if it is empty")
    given = parser.parse_args(arguments)
    given.rows = given.rows or RESULTS / f"strategies_{given.size}.csv"
    return given


def tasks(given: argparse.Namespace) -> list[Task]:
    """Every run that is asked for, seed by seed."""
    setting = SETTINGS[given.size]
    return [
        Task(arm, seed, given.size, given.steps or setting.steps, lr, ratio, not given.raw)
        for seed in given.seeds
        for lr in given.lr or (setting.lr,)
        for ratio in given.mask_ratio or (setting.mask_ratio,)
        for arm in given.arms
    ]


def main(given: argparse.Namespace) -> None:
    """Runs what has no rows yet, and prints the table."""
    if given.table and not given.rows.exists():
        sys.exit(f"{given.rows} does not exist. Leave out --table to make it, or give another --rows.")
    if not given.table:
        given.rows.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{given.rows}.lock", timeout=0):  # released when its process ends, however it ends
                complete(given)
        except Timeout:
            sys.exit(f"{given.rows} is being written by another strategies.py. Wait for it, or give another --rows.")
        except KeyboardInterrupt:
            sys.exit(f"Stopped. The runs that had ended are in {given.rows}, and the same command goes on.")
    if not given.rows_only:
        try:
            print(table(given.rows))
        except ValueError as error:
            sys.exit(f"{given.rows} has {error}")


def complete(given: argparse.Namespace) -> None:
    """Runs what has no rows yet."""
    known = finished(read_rows(given.rows, Row))
    kept = [row for run_rows in known.values() for row in run_rows.values()]
    wanted = [task for task in tasks(given) if task not in known]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = given.commit or current_commit()
    jobs = given.jobs or (1 if device.type == "cuda" else os.cpu_count() or 1)
    with (
        RowWriter(given.rows, Row, kept) as writer,
        contextlib.closing(run_all(wanted, commit, device, jobs)) as ended,
    ):
        for rows in tqdm(ended, total=len(wanted), unit="run"):
            for row in rows:
                writer.add(row)


def run_all(wanted: Sequence[Task], commit: str, device: torch.device, jobs: int) -> Generator[list[Row], None, None]:
    """The rows of each run as it ends; one job runs in this process."""
    if jobs == 1:
        yield from (run(task, commit, device) for task in wanted)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin_worker) as pool:
        try:
            running = [pool.submit(run_alone, task, commit, device) for task in wanted]
            for each in concurrent.futures.as_completed(running):
                yield each.result()
        except BaseException:  # else the pool would first make all other runs, and throw their rows away
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def table(path: Path) -> str:
    """The tables of a file of rows, as on the page."""
    from benchmarks.masking.comparison import groups  # here, since runs need neither scipy nor matplotlib
    from benchmarks.pages.strategies import section

    return "\n\n".join(section(group, path) for group in groups(read_rows(path, Row)))


def _begin_worker() -> None:
    """Ends a worker with its parent, and not before: Ctrl-C reaches both.

    Without this, workers of a killed process finish their runs for nobody, and then wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_alone(task: Task, commit: str, device: torch.device) -> list[Row]:
    """A run in one thread, so that runs side by side do not wait for each other."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return run(task, commit, device)


if __name__ == "__main__":
    main(parse())
