"""Does the sampler learn to show what moves? Measured on `sprites`, where that is known, against random masking.

    python benchmarks/adaptivity.py            # under three minutes on two CPU cores

Trains a small model for 200 steps on raw-pixel targets, then draws masks for clips that it has not seen. Printed for
each masking: mean p on tokens that move over mean p on still ones (for masks without a p, how often they are visible in
its place), and the share of visible tokens that lie on what moves, beside the share of all tokens that move.
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from adamae_sampler import AdaMAELoss
from adamae_sampler.models import AdaMAE
from common.sprites import Sprites

Masking = Literal["adaptive", "random", "tube", "frame"]


@dataclass
class Options:
    """Size of the measurement."""

    maskings: tuple[Masking, ...] = ("adaptive", "random")
    """What is compared."""
    steps: int = 200
    """Training steps of each."""
    clips: int = 16
    """Clips of a step."""
    lr: float = 1e-3
    """Learning rate of AdamW, after 20 steps of warm-up."""
    mask_ratio: float = 0.95
    """Share of tokens masked."""
    test_clips: int = 128
    """Clips for the measurement."""
    draws: int = 50
    """Masks drawn for each of those clips."""
    seed: int = 0
    """Of weights, masks and clips."""
    output: Path = Path(__file__).parent / "results" / "adaptivity_cpu.csv"
    """CSV file for the raw rows."""


@dataclass(frozen=True)
class Adaptivity:
    """What is measured: p(moving) / p(still), share of visible tokens that move, share of all tokens that move."""

    ratio: float
    visible_moving: float
    moving: float


def train(masking: Masking, options: Options) -> AdaMAE:
    """A small model trained on sprites."""
    torch.manual_seed(options.seed)
    model = AdaMAE(
        img_size=64,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=4,
        decoder_embed_dim=96,
        decoder_depth=2,
        decoder_num_heads=4,
        mask_ratio=options.mask_ratio,
        masking=masking,
    )
    criterion = AdaMAELoss(normalize=False, patch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    clips = Sprites(length=options.steps * options.clips, seed=2 * options.seed)
    for step, batch in enumerate(DataLoader(clips, batch_size=options.clips)):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20)
        prediction, sample = model(normalise(batch["video"]))
        criterion(prediction, batch["video"], sample).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def measure(model: AdaMAE, options: Options) -> Adaptivity:
    """Adaptivity on clips of another seed."""
    clips = Sprites(length=options.test_clips, seed=2 * options.seed + 1)
    batch = default_collate([clips[i] for i in range(len(clips))])
    tokens = model.eval().encoder.patch_embed(normalise(batch["video"]))
    samples = [model.sampler(tokens) for _ in range(options.draws)]
    moving = batch["moving"]  # [B, N]
    visible = torch.stack([~sample.mask for sample in samples]).float().mean(0)  # [B, N], how often
    weight = visible if samples[0].log_probs is None else samples[0].log_probs.exp()
    return Adaptivity(
        ratio=float(weight[moving].mean() / weight[~moving].mean()),
        visible_moving=float(visible[moving].sum() / visible.sum()),
        moving=float(moving.float().mean()),
    )


def normalise(video: Tensor) -> Tensor:
    """uint8 -> about zero mean and unit deviation."""
    return (video.float() / 255 - 0.5) / 0.25


def main(options: Options) -> None:
    """Trains, measures, prints, and writes the rows."""
    rows = []
    for masking in options.maskings:
        start = time.perf_counter()
        found = measure(train(masking, options), options)
        rows.append(
            [masking, options.steps, options.seed, *(f"{each:.4f}" for each in astuple(found)), torch.__version__]
        )
        print(
            f"{masking:9s} p(moving)/p(still) {found.ratio:5.2f}   visible tokens on what moves "
            f"{found.visible_moving:.1%} (of all tokens {found.moving:.1%} move)   {options.steps} steps in "
            f"{time.perf_counter() - start:.0f} s"
        )

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["masking", "steps", "seed", "p_moving_over_still", "visible_moving", "moving", "torch"])
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
