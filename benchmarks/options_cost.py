"""What the options of adaptive masking cost: whole training steps in turns, and the sampler over the number of tokens.

    python benchmarks/options_cost.py            # about ten minutes on two CPU cores, or on the GPU if there is one

Steps of a group take turns, each in a process of its own on a CPU, and are divided by the group's first, round by
round. The sampler's forward and backward pass stand beside the encoder's on 5% of the tokens, for clips of 1568 to
18,432 tokens. Rows go to benchmarks/results/options_<device>.csv, the plot beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import tyro
from rows import OFFICIAL, RESULTS, current_commit, device_name, device_slug, write_rows
from steps import StepCase, cpu_clocks, make_step
from timing import Times, ratio, take_turns
from torch import Tensor, nn

from adamae_sampler.models.adamae import thumbnails
from adamae_sampler.models.encoder import Encoder, VideoSize
from adamae_sampler.networks import MHAScoreNetwork, PooledScoreNetwork

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

_FAST: dict[str, Any] = {"score_network": "pooled", "sample_from": "pixels", "decode_ratio": 0.5}
# Frames and height of clips, in tokens of 2 x 16 x 16.
_CLIPS = ((16, 224), (32, 224), (64, 224), (64, 384))
_SCALE_CLIPS = 2  # as many as in a step on a CPU
SCALE = "two clips"  # the group of the parts alone
_COLOURS = {"encoder": "#777777", "exact": "#b5533c", "pooled": "#8fb8d8", "pixels": "#1b6ca8"}


@dataclass(frozen=True)
class Options:
    """Size of the measurement."""

    seconds: float = 75
    """No round of a group begins later."""
    rounds: tuple[int, int] = (5, 9)
    """The fewest rounds of a group of steps, and the most."""
    quick: bool = False
    """Tiny sizes: does it work?"""
    output: Path | None = None
    """Folder for rows and plot; benchmarks/results if none is given."""


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


def groups(device: torch.device, quick: bool) -> dict[str, dict[str, StepCase]]:
    """What takes turns; the first of each is what the others are divided by."""
    exact = StepCase(clips=2, dtype=torch.float32) if device.type == "cpu" else StepCase()
    if quick:
        exact = StepCase(clips=1, dtype=torch.float32, img_size=64, depth=1)
    random = replace(exact, masking="random")
    four: dict[str, Any] = {"num_masks": 4, "clips": max(exact.clips // 4, 1)}
    pixels = {name: value for name, value in _FAST.items() if name != "decode_ratio"}
    visible_half: dict[str, Any] = {"sample_from": "pixels", "decode_ratio": 0.5}
    return {
        "the official formulation": {
            "official": replace(exact, implementation=OFFICIAL),
            "exact": exact,
            "random": random,
            "fast": replace(exact, **_FAST),
        },
        "random masking": {
            "random": random,
            "exact": exact,
            "pooled": replace(exact, score_network="pooled"),
            "pooled, from pixels": replace(exact, **pixels),
        },
        "random masking, visible tokens embedded, half decoded": {
            "random": replace(random, **visible_half),
            "fast": replace(exact, **_FAST),
        },
        "random masking, 4 masks of each clip": {
            "random": replace(random, **four),
            "exact": replace(exact, **four),
        },
        "exact": {
            "exact": exact,
            "half decoded": replace(exact, decode_ratio=0.5),
            "head in 8 chunks": replace(exact, head_chunks=8),
        },
    }


@contextmanager
def step_clocks(cases: Sequence[StepCase], device: torch.device) -> Iterator[dict[StepCase, Callable[[], float]]]:
    """For each case a function that does a step and returns its seconds."""
    if device.type == "cpu":
        with cpu_clocks(cases) as clocks:
            yield {case: clocks[case] for case in cases}
        return
    yield {case: partial(_seconds, make_step(case, device), device) for case in cases}


def part_clocks(frames: int, height: int, device: torch.device, quick: bool) -> tuple[int, dict[str, Any]]:
    """N, and for each part a function that does its forward and backward pass and returns its seconds."""
    size = VideoSize.of(height, frames, 16, 2, 3)
    width, depth = (48, 1) if quick else (768, 12)
    tokens, visible = (
        torch.randn(_SCALE_CLIPS, n, width, device=device) for n in (size.num_tokens, size.num_tokens // 20)
    )
    video = torch.randn(_SCALE_CLIPS, *size.video, device=device)
    pixels = partial(thumbnails, video, size)
    modules: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "encoder": (Encoder(size, width, depth, 12).blocks, lambda: visible.requires_grad_()),
        "exact": (MHAScoreNetwork(width, size.num_tokens), lambda: tokens.requires_grad_()),
        "pooled": (PooledScoreNetwork(width, size.grid), lambda: tokens.requires_grad_()),
        "pixels": (PooledScoreNetwork(pixels().shape[-1], size.grid), pixels),
    }
    clocks = {}
    for name, (module, make_input) in modules.items():
        clocks[name] = partial(_seconds, partial(_both_ways, module.to(device), make_input), device)
    return size.num_tokens, clocks


def _both_ways(module: nn.Module, make_input: Callable[[], Tensor]) -> None:
    x = make_input()
    loss = module(x).square().sum()
    torch.autograd.grad(loss, [*module.parameters(), *([x] if x.requires_grad else [])])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(options: Options) -> None:
    """Measures, writes rows and plot, prints the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(2)
    folder, commit = options.output or RESULTS, current_commit()
    rows: list[Row] = []

    def add(group: str, tokens: dict[str, int], times: dict[str, Times]) -> None:
        first = next(iter(times.values()))
        for name, each in times.items():
            numbers = (each.median, *each.quartiles, ratio(each, first), len(each.seconds), torch.get_num_threads())
            rows.append(Row(group, name, tokens[name], *numbers, device_name(device), torch.__version__, commit))

    for name, cases in groups(device, options.quick).items():
        with step_clocks(list(cases.values()), device) as clocks:
            times = take_turns(clocks, options.seconds, options.rounds)
        tokens = {about: case.fixed_sampler().num_tokens for about, case in cases.items()}
        add(name, tokens, {about: times[case] for about, case in cases.items()})
        print(options_table([row for row in rows if row.group == name]), flush=True)
    for frames, height in ((16, 64), (32, 64)) if options.quick else _CLIPS:
        num_tokens, parts = part_clocks(frames, height, device, options.quick)
        add(SCALE, dict.fromkeys(parts, num_tokens), take_turns(parts, options.seconds / 2, (3, 9)))
    path = folder / f"options_{device_slug(device)}.csv"
    write_rows(path, Row, rows)
    plot(rows, path.with_suffix(".png"))
    print(scale_table(rows))


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
    main(tyro.cli(Options, description=__doc__))
