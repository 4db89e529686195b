"""Times a whole training step against the official formulation, in alternated pairs in one run.

    python benchmarks/training_step.py                    # ViT-B, 95%, 2 clips of 16x224x224, fp32, two threads

Both models get the same weights; before any time is taken their losses and all gradients on the same mask are
compared. A step is forward, losses, backward and AdamW (torch's default one for the baseline, the fused one for ours).
Raw rows go to benchmarks/results/training_step_cpu.csv.
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
from pathlib import Path

import torch
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


def check_same(ours: AdaMAE, official: OfficialFormulation, loss: AdaMAELoss, video: Tensor) -> None:
    """Raises unless both give the same losses and gradients for the same weights and mask, without dropout."""
    ours, official = copy.deepcopy(ours).eval(), copy.deepcopy(official).eval()
    prediction, probs, mask = official(video)
    expected = official_loss(prediction, video, probs, mask)
    expected[0].backward()
    prediction, sample = ours(video, mask=mask)
    got = loss(prediction, video, sample)
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


def arithmetic_seconds(step: Callable[[], Tensor]) -> float:
    """What the matrix products of a step would take at the rate of one large product on this machine, now."""
    with FlopCounterMode(display=False) as counter:
        step()
    a, b = torch.randn(3136, 768), torch.randn(768, 3072)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return counter.get_total_flops() * statistics.median(seconds) / (2 * 3136 * 768 * 3072)


def main(options: Options) -> None:
    """Checks, times, prints, and writes the rows."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    official = OfficialFormulation(img_size=options.img_size, depth=options.depth)
    ours = AdaMAE(img_size=options.img_size, depth=options.depth)
    load_checkpoint(ours, official.state_dict())
    loss = AdaMAELoss(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    video = torch.randn(options.clips, 3, 16, options.img_size, options.img_size)
    check_same(ours, official, loss, video)

    adamw = partial(torch.optim.AdamW, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
    official_optimizer = adamw(official.parameters())
    our_optimizer = adamw(ours.parameters(), fused=True)

    def official_step() -> Tensor:
        prediction, probs, mask = official(video)
        total = official_loss(prediction, video, probs, mask)[0]
        official_optimizer.zero_grad()
        total.backward()
        official_optimizer.step()
        return total

    def our_step() -> Tensor:
        prediction, sample = ours(video)
        total: Tensor = loss(prediction, video, sample).loss
        our_optimizer.zero_grad()
        total.backward()
        our_optimizer.step()
        return total

    steps: dict[str, Callable[[], Tensor]] = {"official": official_step, "adamae_sampler": our_step}
    rows = []
    for pair in range(-options.warmup, options.pairs):
        for name in sorted(steps, reverse=pair % 2 == 0):  # first one, then the other goes first
            start = time.perf_counter()
            steps[name]()
            if pair >= 0:
                rows.append((name, pair, time.perf_counter() - start))
    rows.append(("arithmetic alone", 0, arithmetic_seconds(official_step)))
    _report(rows, options)


def _report(rows: list[tuple[str, int, float]], options: Options) -> None:
    times = {name: [seconds for each, _, seconds in rows if each == name] for name in ("official", "adamae_sampler")}
    ratios = [ours / official for ours, official in zip(times["adamae_sampler"], times["official"], strict=True)]
    for name, seconds in times.items():
        print(f"{name:15s} median {statistics.median(seconds):.2f} s  (min {min(seconds):.2f}, max {max(seconds):.2f})")
    print(
        f"{'ratio by pairs':15s} median {statistics.median(ratios):.3f}  (min {min(ratios):.3f}, max {max(ratios):.3f})"
    )
    floor = rows[-1][2]
    official = statistics.median(times["official"])
    share = f"{floor / official:.3f} of the official step"
    print(f"{'arithmetic':15s} {floor:.2f} s at the rate of one large product, {share}")
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
