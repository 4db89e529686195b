"""`sprites`: generated clips with known motion, for measurements.

One small sprite moves over a still, textured background. A second one of the same contrast stays still, so that
contrast alone does not tell what moves. Clip `i` of seed `s` is the same on every machine and in every order of access.
At the default size 9 to 17% of the tokens move, and 3 to 16% are the still sprite's.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from video_data.sprite_settings import DIRECTIONS, NUM_CLASSES, SHAPES, SpriteSettings


class Sprites(SpriteSettings, Dataset[dict[str, Any]]):
    """Clips of a sprite that moves over a still texture, in front of a still sprite of the same contrast.

    A clip is a dict of
        video: [3, T, H, W] uint8;
        label: int, shape * 4 + direction of the sprite that moves, in 0..19;
        moving: [N] bool, tokens in t-h-w order in which the sprite appears in any frame of the tubelet;
        still: [N] bool, tokens in which the still sprite appears, and not the other.

    It takes the arguments of `SpriteSettings`.
    """

    num_classes = NUM_CLASSES

    @classmethod
    def of(cls, settings: SpriteSettings) -> Sprites:
        """The clips with these settings."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(settings) if each.init})

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"no clip {index}; expected 0 to {self.length - 1}.")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=generator) * (high - low) + low

        label = int(torch.randint(self.num_classes, (), generator=generator))
        shape, direction = divmod(label, DIRECTIONS)
        half = self.img_size // 2
        background = self._texture(uniform(0.4, 0.6, 3, 5, 5), uniform(-0.05, 0.05, 3, half, half))
        colour = torch.randint(2, (3,), generator=generator) * 0.75 + uniform(0, 0.25, 3)  # near the corners of RGB
        inside = self._path(shape, direction, uniform)  # [T, H, W]
        sprite = self._striped(colour, uniform)
        other = self._path(int(torch.randint(len(SHAPES), (), generator=generator)), None, uniform)
        behind = torch.where(other, self._striped(colour.roll(1), uniform), background[:, None])
        video = torch.where(inside, sprite, behind)
        moving = self._tokens(inside)
        return {
            "video": (video.clamp(0, 1) * 255).round().to(torch.uint8),
            "label": label,
            "moving": moving,
            "still": self._tokens(other) & ~moving,
        }

    @staticmethod
    def _texture(coarse: Tensor, fine: Tensor) -> Tensor:
        """The background [3, H, W]: smooth blotches with grain."""
        size = fine.shape[-1] * 2
        blotches = interpolate(coarse[None], size=(size, size), mode="bicubic", align_corners=False)[0]
        grain = interpolate(fine[None], scale_factor=2, mode="nearest")[0]
        return (blotches + grain).clamp(0, 1)

    def _striped(self, colour: Tensor, uniform: Any) -> Tensor:
        """[3] -> [3, 1, 1, W]: the colour, darker in stripes."""
        stripes = 0.75 + 0.25 * torch.sin(torch.arange(self.img_size) * 1.6 + uniform(0, 6.28))
        return colour[:, None, None, None] * stripes

    def _path(self, shape: int, direction: int | None, uniform: Any) -> Tensor:
        """The pixels of a sprite in each frame, [T, H, W] bool. It wraps around the borders; without a direction it
        stays where it is."""
        size = self.img_size
        radius = uniform(0.12, 0.15) * size
        travel = uniform(0.5, 0.9) * size / self.num_frames if direction is not None else 0.0  # pixels per frame
        angle = (direction or 0) * math.pi / 2
        time = torch.arange(self.num_frames)
        start_x, start_y = uniform(0, 1, 2) * size
        x = (start_x + time * travel * math.cos(angle)) % size  # [T]
        y = (start_y + time * travel * math.sin(angle)) % size
        grid = torch.arange(size) + 0.5
        # Offset of each pixel from the sprite's centre, the short way around the border.
        dx = (grid - x[:, None] + size / 2) % size - size / 2  # [T, W]
        dy = (grid - y[:, None] + size / 2) % size - size / 2  # [T, H]
        dx, dy = dx[:, None, :] / radius, dy[:, :, None] / radius
        if SHAPES[shape] == "disc":
            return dx**2 + dy**2 <= 1
        if SHAPES[shape] == "square":
            return torch.maximum(dx.abs(), dy.abs()) <= 0.9
        if SHAPES[shape] == "triangle":
            return (dy <= 0.9) & (dy >= 2 * dx.abs() - 0.9)
        if SHAPES[shape] == "cross":
            return (torch.minimum(dx.abs(), dy.abs()) <= 0.35) & (torch.maximum(dx.abs(), dy.abs()) <= 1)
        return (dx**2 + dy**2 <= 1.1) & (dx**2 + dy**2 >= 0.3)  # ring

    def _tokens(self, inside: Tensor) -> Tensor:
        """[T, H, W] bool -> [N] bool: True if any pixel of the token is True."""
        t, p = self.tubelet_size, self.patch_size
        blocks = inside.unflatten(0, (-1, t)).unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [T', t, H', p, W', p]
        return blocks.any(5).any(3).any(1).flatten()
