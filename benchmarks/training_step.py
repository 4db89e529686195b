"""Times a whole training step against the official formulation, in alternated pairs in one run.

    python benchmarks/training_step.py                    # ViT-B, 95%, 2 clips of 16x224x224, fp32, two threads

Both models get the same weights; before any time is taken their losses and all gradients on the same mask are
compared. Each then steps in a process of its own, in turn. A step is forward, losses, backward and AdamW (torch's
default one for the baseline, the fused one for ours). Beside them stands the time that the step's matrix products
alone would take at the rate of one large product, measured between the steps. Raw rows go to
benchmarks/results/training_step_cpu.csv.
"""

from __future__ import annotations

import copy
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing as mp
import tyro
from official_formulation import OfficialFormulation, official_loss
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adamae_sampler import AdaMAELoss
from adamae_sampler.models import AdaMAE, load_checkpoint

RESULTS = Path(__file__).parent / "results" / "training_step_cpu.csv"


@dataclass
class Options:
    """What is timed."""

    clips: int = 2
    """Clips in a batch."""
    pairs: int = 7
    """Alternated pairs that count."""
    warmup: int = 2
    """Pairs before those, which do not."""
    threads: int = 2
    """Threads of PyTorch."""
    img_size: int = 224
    """Height and width of a frame."""
    depth: int = 12
    """Blocks of the encoder."""
    output: Path = RESULTS
    """CSV file for the raw rows."""


def check_same(options: Options) -> None:
    """Raises unless both give the same losses and gradients for the same weights and mask, without dropout."""
    torch.manual_seed(0)
    official = OfficialFormulation(img_size=options.img_size, depth=options.depth).eval()
    ours = AdaMAE(img_size=options.img_size, depth=options.depth).eval()
    load_checkpoint(ours, official.state_dict())
    video = make_video(options)
    prediction, probs, mask = official(video)
    expected = official_loss(prediction, video, probs, mask)
    expected[0].backward()
    prediction, sample = ours(video, mask=mask)
    got = LOSS(prediction, video, sample)
    got.loss.backward()
    torch.testing.assert_close(got[:3], expected, rtol=1e-5, atol=0)
    official_grads = copy.deepcopy(ours)
    load_checkpoint(official_grads, {name: each.grad for name, each in official.named_parameters()})
    for (name, mine), theirs in zip(ours.named_parameters(), official_grads.parameters(), strict=True):
        if mine.grad is None:
            raise AssertionError(f"{name} has no gradient")
        difference, size = float((mine.grad - theirs.detach()).norm()), float(theirs.detach().norm())
        if difference > max(1e-4 * size, 1e-8):  # what only shifts all scores has no gradient but rounding
            raise AssertionError(f"gradients of {name} differ by {difference:.1e}, of {size:.1e}")


def count_flops(options: Options) -> int:
    """Floating-point operations of the matrix products in a step."""
    step = official_step(options)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def product_rate() -> float:
    """Floating-point operations a second of one large matrix product, now."""
    a, b = torch.randn(3136, 768), torch.randn(768, 3072)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 3136 * 768 * 3072 / statistics.median(seconds)


def official_step(options: Options) -> Callable[[], Tensor]:
    """A training step of the official formulation."""
    torch.manual_seed(0)
    model = OfficialFormulation(img_size=options.img_size, depth=options.depth)
    optimizer = ADAMW(model.parameters())
    video = make_video(options)

    def step() -> Tensor:
        prediction, probs, mask = model(video)
        total = official_loss(prediction, video, probs, mask)[0]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total

    return step


def our_step(options: Options) -> Callable[[], Tensor]:
    """A training step of the package."""
    torch.manual_seed(0)
    model = AdaMAE(img_size=options.img_size, depth=options.depth)
    optimizer = ADAMW(model.parameters(), fused=True)
    video = make_video(options)

    def step() -> Tensor:
        prediction, sample = model(video)
        total = LOSS(prediction, video, sample).loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total

    return step


STEPS = {"official": official_step, "adamae_sampler": our_step}
ADAMW = partial(torch.optim.AdamW, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
LOSS = AdaMAELoss(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


def make_video(options: Options) -> Tensor:
    """[B, 3, 16, H, W], mean/std-normalised."""
    return torch.randn(options.clips, 3, 16, options.img_size, options.img_size)


def work(name: str, options: Options, orders: Connection) -> None:
    """A process that does one step for each message it gets, and answers with its seconds."""
    torch.set_num_threads(options.threads)
    step = STEPS[name](options)
    while orders.recv():
        start = time.perf_counter()
        step()
        orders.send(time.perf_counter() - start)


def main(options: Options) -> None:
    """Checks, times, prints, and writes the rows."""
    torch.set_num_threads(options.threads)
    check_same(options)
    flops = count_flops(options)
    context = mp.get_context("spawn")  # a process each, since a heap that the other has used is slower or faster
    lines, workers = {}, []
    for name in STEPS:
        lines[name], theirs = context.Pipe()
        workers.append(context.Process(target=work, args=(name, options, theirs), daemon=True))
        workers[-1].start()
    rows = []
    for pair in range(-options.warmup, options.pairs):
        for name in sorted(STEPS, reverse=pair % 2 == 0):  # first one, then the other goes first
            lines[name].send(True)
            seconds = lines[name].recv()
            if pair >= 0:
                rows.append((name, pair, seconds))
        if pair >= 0:
            rows.append(("arithmetic alone", pair, flops / product_rate()))
    for name, worker in zip(STEPS, workers, strict=True):
        lines[name].send(False)
        worker.join()
    _report(rows, options)


def _report(rows: list[tuple[str, int, float]], options: Options) -> None:
    names = dict.fromkeys(name for name, _, _ in rows)
    times = {name: [seconds for each, _, seconds in rows if each == name] for name in names}
    for name in names:
        ratios = [each / official for each, official in zip(times[name], times["official"], strict=True)]
        spread = f"({min(times[name]):.2f} to {max(times[name]):.2f})"
        share = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:16s} median {statistics.median(times[name]):.2f} s {spread}, of the official step {share}")
    facts = {
        "device": _cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "commit": _commit(),
        "clips": options.clips,
        "shape": f"16x{options.img_size}x{options.img_size}",
        "depth": options.depth,
        "dtype": "float32",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["implementation", "pair", "seconds", *facts])
        writer.writerows([name, pair, f"{seconds:.4f}", *facts.values()] for name, pair, seconds in rows)
    print(f"rows in {options.output}")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
