"""What the options of adaptive masking cost on a CPU: whole training steps in turns, and the sampler over more tokens.

    python benchmarks/options_cost.py            # about ten minutes on two cores; on a GPU gpu.py measures them

Steps of a group take turns, each in a process of its own, and are divided by the group's first, round by round. The
sampler's forward and backward pass stand beside the encoder's on 5% of the tokens, for clips of 1568 to 18,432 tokens.
Rows go to benchmarks/results/options_cpu.csv as each group is measured, the plot beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from cases import QUICK_STEP
from commit import current_commit
from option_cases import option_groups, part_cases
from rows import RESULTS, RowWriter, device_name
from steps import StepCase, cpu_clocks
from timing import Times, ratio, take_turns
from worker import in_one_line

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

SCALE = "two clips"  # the group of the parts alone
_COLOURS = {"encoder": "#777777", "exact": "#b5533c", "pooled": "#8fb8d8", "pixels": "#1b6ca8"}


@dataclass(frozen=True)
class Row:
    """One measurement; seconds of a step, or of a forward and backward pass of one part."""

    group: str
    what: str
    tokens: int
    median_s: float
    q1_s: float
    q3_s: float
    of_first: float  # by round
    repeats: int
    threads: int
    device: str
    torch: str
    commit: str


def main(seconds: float, quick: bool, output: Path, commit: str) -> None:
    """Measures, writes rows and plot, prints the tables.

    Args:
        seconds: no round of a group begins later.
        quick: tiny sizes: does it work?
        output: folder for rows and plot.
        commit: that the rows name.
    """
    device, rounds = torch.device("cpu"), (2, 3) if quick else (5, 9)
    torch.set_num_threads(1 if quick else 2)
    problems = []
    path = output / "options_cpu.csv"
    with RowWriter(path, Row) as writer:

        def add(group: str, tokens: dict[str, int], times: dict[str, Times]) -> None:
            first = next(iter(times.values()))
            for name, each in times.items():
                numbers = (each.median, *each.quartiles, ratio(each, first), len(each.seconds), torch.get_num_threads())
                writer.add(Row(group, name, tokens[name], *numbers, device_name(device), torch.__version__, commit))

        def step_times(cases: dict[str, StepCase]) -> dict[str, Times]:
            with cpu_clocks(list(cases.values())) as clocks:
                found = take_turns(clocks, seconds, rounds)
            return {name: found[case] for name, case in cases.items()}

        exact = QUICK_STEP if quick else StepCase(clips=2, dtype=torch.float32)
        for group, cases in option_groups(exact).items():
            try:
                times = step_times(cases)
            except Exception as error:  # the other groups are still worth their time; this one is named at the end
                problems.append(f"failed: {group}: {in_one_line(error)}")
                continue
            add(group, {name: case.fixed_sampler().num_tokens for name, case in cases.items()}, times)
            print(options_table([row for row in writer.rows if row.group == group]), flush=True)
        parts = part_cases(2, quick)
        for tokens in dict.fromkeys(part.size.num_tokens for part in parts):
            mine = {part.label: part for part in parts if part.size.num_tokens == tokens}
            clocks: dict[str, Callable[[], float]] = {
                name: partial(_seconds, part.make(device)) for name, part in mine.items()
            }
            add(SCALE, dict.fromkeys(mine, tokens), take_turns(clocks, seconds / 2, (3, 9)))
        plot(writer.rows, path.with_suffix(".png"))
        print(scale_table(writer.rows))
    if problems:
        sys.exit("\n".join(problems))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def options_table(rows: Sequence[Row]) -> str:
    """A line for each step, as Markdown."""
    lines = ["| beside | step | time | ratio |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.group} | {row.what} | {row.median_s:.3g} s | {row.of_first:.2f} |" for row in rows]
    return "\n".join(lines)


def scale_table(rows: Sequence[Row]) -> str:
    """A line for each number of tokens: seconds of each part, and how many times those of the fewest tokens."""
    scale = [row for row in rows if row.group == SCALE]
    parts = list(dict.fromkeys(row.what for row in scale))
    fewest = {row.what: row.median_s for row in reversed(scale)}
    lines = [f"| tokens | {' | '.join(parts)} |", "| --- " * (len(parts) + 1) + "|"]
    for tokens in dict.fromkeys(row.tokens for row in scale):
        found = {row.what: row.median_s for row in scale if row.tokens == tokens}
        cells = [f"{found[part]:.3g} s ({found[part] / fewest[part]:.1f})" for part in parts]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds of each part over the tokens of a clip."""
    figure, axes = plt.subplots(figsize=(6, 4))
    labels = {
        "encoder": "ViT-B's encoder, 5% of the tokens",
        "exact": "exact sampler",
        "pooled": "pooled sampler, from tokens",
        "pixels": "pooled sampler, from pixels",
    }
    for name, colour in _COLOURS.items():
        mine = [row for row in rows if row.group == SCALE and row.what == name]
        axes.plot([row.tokens for row in mine], [row.median_s for row in mine], "o-", color=colour, label=labels[name])
    axes.set(xscale="log", yscale="log", xlabel="tokens of a clip", ylabel="seconds, forward and backward")
    axes.set_xticks([row.tokens for row in rows if row.group == SCALE and row.what == "encoder"])
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.set_title(rows[0].device, fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75.0, help="no round of a group begins later")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for rows and plot")
    parser.add_argument("--commit", default="", help="what the rows name as the commit; git is asked if it is empty")
    given = parser.parse_args()
    main(given.seconds, given.quick, given.output, given.commit or current_commit())
