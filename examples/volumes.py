"""Adaptive masking of medical volumes: one channel, and patches that are as deep as a slab of slices.

python examples/volumes.py     # half a minute on two CPU cores

Trains the reference model on generated scans. A body of smooth tissue holds one lesion, whose texture nothing around it
tells. Tokens outside the scanner's round field of view hold no data, and `valid` leaves them out. The sampler learns to
show the lesion. The script prints how much of it is visible, and p(lesion) / p(others); with `main(sampling_weight=0)`
that stays 1.
"""

from __future__ import annotations

import common.threads  # noqa: F401 - before torch

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_sampler.models import AdaMAE
from training.clip_loop import Clips, train_on_clips

DEPTH, HEIGHT, WIDTH = 24, 64, 64  # voxels
PATCH = (6, 8, 8)


def main(steps: int = 100, sampling_weight: float = 1e-3) -> list[float]:
    """Trains; returns p(lesion) / p(other valid tokens) of each step."""
    torch.manual_seed(0)
    model = AdaMAE(
        img_size=(HEIGHT, WIDTH), num_frames=DEPTH, patch_size=PATCH[1:], tubelet_size=PATCH[0], in_chans=1,
        embed_dim=96, depth=3, num_heads=3, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3,
        mask_ratio=0.85, score_network="pooled",
    )  # fmt: skip
    return train_on_clips(model.train(), scans, "of a lesion", steps, sampling_weight)


def scans(generator: torch.Generator, number: int = 8) -> Clips:
    """Scans [B, 1, D, H, W]. A volume is a clip whose frames are its slices."""
    z, y, x = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float32) for side in (DEPTH, HEIGHT, WIDTH)), indexing="ij"
    )
    in_view = (y - HEIGHT / 2).square() + (x - WIDTH / 2).square() < (HEIGHT / 2) ** 2

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(number, generator=generator)).view(-1, 1, 1, 1)

    tissue = (0.1 * y + uniform(0, 6)).sin() + 0.05 * z
    distance = (z - uniform(8, 16)).square() + (y - uniform(22, 42)).square() + (x - uniform(22, 42)).square()
    lesion = distance < 100
    texture = 1.5 * torch.randn(distance.shape, generator=generator)
    voxels = torch.where(lesion, texture, tissue) * in_view
    return Clips(voxels[:, None], of_tokens(in_view.expand_as(lesion), PATCH), of_tokens(lesion, PATCH))


def of_tokens(where: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, T, H, W] bool of voxels -> [B, N] bool, True for tokens with at least half of their voxels True."""
    return F.avg_pool3d(where.float()[:, None], patch).flatten(1) >= 0.5


if __name__ == "__main__":
    main()
