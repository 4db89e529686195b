"""The augmentation of the recipe that torchvision does not have: MultiScaleCrop."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

SCALES = (1.0, 0.875, 0.75, 0.66)
_MAX_DISTORT = 1  # how many steps of SCALES height and width may differ by
# Where a crop may lie, in quarters of the free space: corners, centre, middles of the sides, quarter points.
_OFFSETS = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]


def multi_scale_crop(frames: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """One random crop for all frames, resized (Wang et al., 2016, "Temporal Segment Networks", MultiScaleCrop).

    Height and width are drawn from SCALES of the largest box of the target's aspect ratio, at most one step apart,
    and the place from thirteen fixed ones.

    Args:
        frames: [T, C, H, W].
        size: height and width of the result.
        generator: source of randomness.
    """
    height, width = frames.shape[-2:]
    unit = min(height / size[0], width / size[1])
    pairs = [(h, w) for i, h in enumerate(SCALES) for j, w in enumerate(SCALES) if abs(i - j) <= _MAX_DISTORT]
    scale_h, scale_w = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    crop_h, crop_w = max(int(size[0] * unit * scale_h), 1), max(int(size[1] * unit * scale_w), 1)
    right, down = _OFFSETS[int(torch.randint(len(_OFFSETS), (), generator=generator))]
    top, left = (height - crop_h) // 4 * down, (width - crop_w) // 4 * right
    cropped: Tensor = tvf.resized_crop(frames, top, left, crop_h, crop_w, list(size), antialias=True)
    return cropped


def random_flip(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors all frames left to right, or none, each with probability 1/2."""
    return frames.flip(-1) if torch.rand((), generator=generator) < 0.5 else frames
