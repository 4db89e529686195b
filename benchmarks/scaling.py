"""What a step loses to other GPUs: a projection of the efficiency of DDP from a step time and stated link speeds.

    python benchmarks/scaling.py --clips-per-second 38.3 --batch-size 16           # of one GPU, as you measured it

The gradients (S bytes, fp32) are summed over G GPUs of a machine by their links, then over M machines by the
network, each at its speed in bytes/s, as NCCL's hierarchical rings do:

    t_sum  = 2 (G-1)/G S / link + 2 (M-1)/M S / network,     link of a GPU, network of a machine, one direction
    t_lost = max(t_sum - 2/3 t_step, t_sum 25 MiB / S)       the backward pass, two thirds of a step, hides the rest;
                                                             the last of DDP's buckets of 25 MiB comes after it
    efficiency = t_step / (t_step + t_lost)

Not in it: waiting for the slowest process, latencies, reading of videos, other traffic. It is a bound, no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import timm
import tyro

import adamae_sampler.models  # noqa: F401 - registers them with timm

_BUCKET = 25 * 2**20
_GPUS = (8, 64, 512)


class Links(NamedTuple):
    """Bytes per second in one direction, as the makers state them."""

    name: str
    link: float  # of a GPU to the others of its machine
    network: float  # of a machine to the others


LINKS = (
    Links("NVLink of an H100 or H200, 450 GB/s; 8 x 400 Gbit/s InfiniBand for each machine", 450e9, 400e9),
    Links("the same NVLink; one 100 Gbit/s Ethernet for each machine", 450e9, 12.5e9),
)


@dataclass(frozen=True)
class Pace:
    """How fast one GPU steps.

    Attributes:
        clips_per_second: of one GPU, alone.
        batch_size: clips of its part of a step.
        source: where the number is from.
    """

    clips_per_second: float
    batch_size: int = 32
    source: str = "given"

    @property
    def step_time(self) -> float:
        """Seconds."""
        return self.batch_size / self.clips_per_second


# 168,913 clips of SSv2 in 9 min 11 s on 8 GPUs, 16 clips each (supplement, Table 4), data and communication included.
PAPER = Pace(168_913 / 551 / 8, 16, "the paper's, by its Table 4")


def gradient_bytes(model: str = "pretrain_adamae_vit_base_patch16_224") -> int:
    """Of fp32 gradients of all parameters."""
    return 4 * sum(each.numel() for each in timm.create_model(model).parameters() if each.requires_grad)


def efficiency(step_time: float, size: int, gpus: int, links: Links, per_machine: int = 8) -> tuple[float, float]:
    """Seconds that the sum of the gradients takes, and the share of the time that is left for steps."""
    inside = min(gpus, per_machine)
    machines = gpus // inside
    takes = 2 * (inside - 1) / inside * size / links.link + 2 * (machines - 1) / machines * size / links.network
    lost = max(takes - 2 / 3 * step_time, takes * min(_BUCKET / size, 1.0))
    return takes, step_time / (step_time + lost)


def scaling_table(paces: Sequence[Pace]) -> str:
    """A line for each pace and kind of links, a column for each number of GPUs."""
    size = gradient_bytes()
    lines = [
        f"| Pace of one device | step | links | {' | '.join(f'{gpus} GPUs' for gpus in _GPUS)} |",
        "| --- " * (3 + len(_GPUS)) + "|",
    ]
    for pace in paces:
        for links in LINKS:
            cells = []
            for gpus in _GPUS:
                takes, share = efficiency(pace.step_time, size, gpus, links)
                cells.append(f"{share:.1%} (sum {1e3 * takes:.1f} ms)")
            name = f"{pace.clips_per_second:.3g} clips/s, {pace.batch_size} a step, {pace.source}"
            lines.append(f"| {name} | {pace.step_time:.3g} s | {links.name} | {' | '.join(cells)} |")
    return "\n".join([f"Gradients: {size / 1e6:.0f} MB.", "", *lines])


if __name__ == "__main__":
    print(scaling_table([tyro.cli(Pace, description=__doc__)]))
