"""Transforms of the frames of a clip: crops, flips and RandAugment for training, fixed crops for evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

Transform = Callable[[Tensor, torch.Generator], Tensor]  # frames [T, C, H, W] -> [T, C, *size]

SCALES = (1.0, 0.875, 0.75, 0.66)
_MAX_DISTORT = 1  # height and width may differ by so many steps of SCALES
_SNAP = 3  # a crop that is less than this from the target's size is taken in that size, without resizing
# Places of a crop, in quarters of the free space: corners, centre, middles of the sides, quarter points.
_OFFSETS = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]


def multi_scale_crop(frames: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """One random crop for all frames, resized (Wang et al., 2016, "Temporal Segment Networks", MultiScaleCrop).

    Height and width are SCALES times the largest box of the target's aspect ratio, at most one step of SCALES apart.
    The crop lies at one of thirteen fixed places. Sizes and places are the official code's.

    Args:
        frames: [T, C, H, W].
        size: height and width of the result.
        generator: source of randomness.
    """
    height, width = frames.shape[-2:]
    box = (height, height * size[1] / size[0]) if _height_binds(frames, size) else (width * size[0] / size[1], width)
    heights, widths = (
        [_snapped(int(side * scale), target, room) for scale in SCALES]
        for side, target, room in zip(box, size, (height, width), strict=True)
    )
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= _MAX_DISTORT]
    crop_h, crop_w = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    right, down = _OFFSETS[int(torch.randint(len(_OFFSETS), (), generator=generator))]
    top, left = (height - crop_h) // 4 * down, (width - crop_w) // 4 * right
    cropped: Tensor = tvf.resized_crop(frames, top, left, crop_h, crop_w, list(size), antialias=True)
    return cropped


def _height_binds(frames: Tensor, size: tuple[int, int]) -> bool:
    """Whether the largest box of this aspect ratio in a frame has the frame's height."""
    return frames.shape[-2] * size[1] <= frames.shape[-1] * size[0]


def _snapped(side: int, target: int, room: int) -> int:
    return target if abs(side - target) < _SNAP and target <= room else max(side, 1)


def random_flip(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors all frames left to right, or none, each with probability 1/2."""
    return frames.flip(-1) if torch.rand((), generator=generator) < 0.5 else frames


class PretrainTransform:
    """MultiScaleCrop, and an optional flip (supplement, Table 6)."""

    def __init__(self, size: tuple[int, int], flip: bool) -> None:
        self.size = size
        self.flip = flip

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """[T, C, H, W] uint8 -> [T, C, *size] uint8."""
        frames = multi_scale_crop(frames, self.size, generator)
        return random_flip(frames, generator) if self.flip else frames


class FinetuneTransform:
    """RandAugment, a random resized crop, and an optional flip (supplement, Table 7; VideoMAE's order).

    Args:
        size: height and width of the result.
        randaugment: timm's configuration, such as "rand-m7-n4-mstd0.5-inc1"; empty for none.
        flip: mirror half of the clips.

    Raises:
        ValueError: timm cannot read `randaugment`.
    """

    def __init__(self, size: tuple[int, int], randaugment: str, flip: bool) -> None:
        hparams = {"translate_const": int(0.45 * min(size)), "interpolation": Image.Resampling.BICUBIC}
        try:
            self.augment = rand_augment_transform(randaugment, hparams) if randaugment else None
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"randaugment={randaugment!r}, expected timm's form, such as 'rand-m7-n4-mstd0.5-inc1'."
            ) from error
        self.crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
        self.flip = flip

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """[T, C, H, W] uint8 -> [T, C, *size] uint8."""
        if self.augment is not None:
            seed = _draw_seed(generator)
            augmented = []
            for frame in frames:
                with seeded(seed):  # every frame gets the same operations at the same strength
                    augmented.append(tvf.pil_to_tensor(self.augment(tvf.to_pil_image(frame))))
            frames = torch.stack(augmented)
        with seeded(_draw_seed(generator)):
            frames = self.crop(frames)
        return random_flip(frames, generator) if self.flip else frames


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of timm and torchvision, and restores their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from it
    try:
        with torch.random.fork_rng(devices=[]):
            seed_libraries(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_libraries(seed: int) -> None:
    """Seeds Python's and NumPy's generators, which timm's Mixup and RandomErasing draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def fixed_crops(frames: Tensor, size: tuple[int, int], crops: int) -> list[Tensor]:
    """Fixed crops for evaluation: resized to just cover `size`, then cut evenly along the longer side.

    Args:
        frames: [T, C, H, W].
        size: height and width of a crop.
        crops: number of crops. One is the centre; three are left, centre, right or top, centre, bottom.

    Returns:
        `crops` tensors [T, C, *size].
    """
    height, width = frames.shape[-2:]
    binds = _height_binds(frames, size)
    covering = [size[0], width * size[0] // height] if binds else [height * size[1] // width, size[1]]
    frames = tvf.resize(frames, covering, antialias=True)
    free = (covering[0] - size[0], covering[1] - size[1])

    def place(room: int, crop: int) -> int:
        return room // 2 if crops == 1 else room * crop // (crops - 1)

    return [tvf.crop(frames, place(free[0], crop), place(free[1], crop), *size) for crop in range(crops)]
