"""Generated clips with known truth: one object moves over a smooth texture, and others of the same look stay still.

Pixels are grey. Textures are 1/f noise. Every object has a shape, a size, a texture of its own, and a brightness that
differs from the background's by the same amount. So a single frame does not tell which object moves. Half of the movers
change their direction in mid-clip.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

SHAPES = ("disc", "square", "diamond", "ring")
_BANK, _TEXTURES = 128, 256  # pixels of a texture's side; number of textures
_SLOPE = 2.0  # amplitude falls as 1 / frequency ** _SLOPE
_CONTRAST, _OFFSET = 0.10, 0.20  # deviation of textures; brightness of objects, less that of the background
_SPEED = (0.5, 1.5)  # pixels a frame
_COVERED = 0.1  # share of a token's pixels that an object covers, from which the token is the object's
_CHUNK = 256  # clips rendered at a time


@dataclass(frozen=True)
class Cut(abc.ABC):
    """Where clips come from, and how they are cut into tokens.

    Attributes:
        height: of a frame, in pixels.
        width: of a frame.
        patch: height and width of a token.
        channels: of a pixel.
        sizes: areas that movers have, in patches; empty if they are not known.
        frames: of a clip.
        tubelet: frames of a token.
    """

    height: int
    width: int
    patch: int
    channels: int
    sizes: tuple[int, ...]
    frames: int = 8
    tubelet: int = 2

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W), tokens in time, height and width."""
        return self.frames // self.tubelet, self.height // self.patch, self.width // self.patch

    @abc.abstractmethod
    def make(self, number: int, seed: int) -> Labelled:
        """Clips that depend on the arguments alone."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Clips, and which of their tokens belong to what moves.

    Attributes:
        cut: of the clips.
        video: [n, C, T, H, W] uint8.
        moving: [n, N] bool, tokens of what moves.
    """

    cut: Cut
    video: Tensor
    moving: Tensor

    def __len__(self) -> int:
        return len(self.video)

    @property
    def groups(self) -> dict[str, Tensor]:
        """Kinds of tokens, each [n, N] bool."""
        return {"moving": self.moving, "ground": ~self.moving}

    def by_size(self) -> list[Tensor]:
        """Which clips [n]: all, then those with a mover of each size. Sizes that no clip has are left out."""
        return [torch.ones(len(self), dtype=torch.bool, device=self.video.device)]

    def first(self, number: int) -> Self:
        """The first of them."""
        return self._each(lambda each: each[:number])

    def without(self, others: Labelled) -> Self:
        """Those whose pixels are not those of one of the others."""
        known = {video.tobytes() for video in others.video.cpu().numpy()}
        new = [video.tobytes() not in known for video in self.video.cpu().numpy()]
        chosen = torch.tensor(new, device=self.video.device)
        return self._each(lambda each: each[chosen])

    def to(self, device: torch.device) -> Self:
        """The same clips on a device."""
        return self._each(lambda each: each.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(each) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Scene(Cut):
    """Generated clips of grey pixels. Movers have each size equally often in the mean; still objects have them too.

    Attributes:
        num_still: objects that stay still.
    """

    num_still: int = 2

    def make(self, number: int, seed: int) -> Clips:
        """Clips that depend on the arguments alone."""
        generator = torch.Generator().manual_seed(seed)
        bank = textures(generator)
        parts = [_render(min(_CHUNK, number - at), bank, self, generator) for at in range(0, number, _CHUNK)]
        return Clips(self, **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


FINE = Scene(32, 32, patch=4, channels=1, sizes=(1, 2, 4, 8, 16))  # 256 tokens
COARSE = Scene(48, 48, patch=8, channels=1, sizes=(2,), num_still=1)  # 144 tokens


@dataclass(frozen=True, eq=False)
class Clips(Labelled):
    """Generated clips and their labels.

    Attributes:
        still: [n, N] bool, tokens of objects that do not move, without those of the mover.
        size: [n], index into the sizes.
        shape: [n], index into SHAPES.
        position: [n, T', 2] fp32, centre of the mover (y, x) in pixels, mean over the frames of a time step.
        velocity: [n, T', 2] fp32, pixels a frame (y, x), mean over the frames of a time step.
        turns: [n] bool, whether the mover changes its direction.
    """

    still: Tensor
    size: Tensor
    shape: Tensor
    position: Tensor
    velocity: Tensor
    turns: Tensor

    @property
    def groups(self) -> dict[str, Tensor]:
        """Kinds of tokens, each [n, N] bool."""
        return {"moving": self.moving, "still": self.still, "ground": ~(self.moving | self.still)}

    def by_size(self) -> list[Tensor]:
        """Which clips [n]: all, then those with a mover of each size. Sizes that no clip has are left out."""
        chosen = [self.size == k for k in range(len(self.cut.sizes))]
        return [*super().by_size(), *(each for each in chosen if each.any())]


def textures(generator: torch.Generator) -> Tensor:
    """[textures, side, side] fp32 1/f noise that wraps around, with mean 0 and deviation 1."""
    white = torch.randn(_TEXTURES, _BANK, _BANK, generator=generator)
    y, x = torch.fft.fftfreq(_BANK)[:, None], torch.fft.rfftfreq(_BANK)
    frequency = torch.hypot(y, x) * _BANK
    amplitude = frequency.clamp_min(1) ** -_SLOPE
    amplitude[0, 0] = 0  # no mean
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(_BANK, _BANK))
    return noise / noise.std(dim=(1, 2), keepdim=True)


def _render(number: int, bank: Tensor, scene: Scene, generator: torch.Generator) -> dict[str, Tensor]:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    size = torch.cat([integers(len(scene.sizes), number, 1), integers(len(scene.sizes), number, scene.num_still)], 1)
    side = torch.tensor(scene.sizes).sqrt()[size] * scene.patch  # [n, 1 + still], the mover first
    shape = integers(len(SHAPES), number, 1 + scene.num_still)
    offset = torch.where(uniform(number, 1 + scene.num_still) < 0.5, -_OFFSET, _OFFSET)

    position, velocity, turns = _paths(number, side[:, 0], scene, uniform)
    centre = uniform(number, scene.num_still, 2) * (scene.height - side[:, 1:, None]) + side[:, 1:, None] / 2

    pixel = torch.arange(scene.height) + 0.5

    def crop(width: int) -> Tensor:  # [n, width, width], of random textures at random places
        rows, columns = (integers(_BANK, number, 1) + torch.arange(width) for _ in range(2))
        which = integers(_TEXTURES, number)
        return bank[which[:, None, None], rows[:, :, None] % _BANK, columns[:, None, :] % _BANK]

    frame = 0.5 + _CONTRAST * crop(scene.height)
    still_cover = torch.zeros(number, scene.height, scene.height)
    for k in range(scene.num_still):
        at = pixel - centre[:, k, :, None]  # [n, 2, side]
        cover = _cover(at[:, 0, :, None], at[:, 1, None, :], side[:, 1 + k, None, None], shape[:, 1 + k])
        look = 0.5 + offset[:, 1 + k, None, None] + _CONTRAST * crop(scene.height)
        frame = torch.lerp(frame, look, cover)
        still_cover = torch.maximum(still_cover, cover)

    at = pixel - position[..., None]  # [n, T, 2, side]
    cover = _cover(at[:, :, 0, :, None], at[:, :, 1, None, :], side[:, :1, None, None], shape[:, 0])
    look = 0.5 + offset[:, :1, None, None] + _CONTRAST * _carried(crop(2 * scene.height), position, scene)
    video = torch.lerp(frame[:, None], look, cover).clamp(0, 1).mul(255).round().to(torch.uint8)

    def of_tokens(x: Tensor) -> Tensor:  # [n, T, side, side] -> [n, N] share
        steps, rows, columns = scene.grid
        cells = x.reshape(number, steps, scene.tubelet, rows, scene.patch, columns, scene.patch)
        return cells.mean((2, 4, 6)).flatten(1)

    moving = of_tokens(cover) > _COVERED
    still = (of_tokens(still_cover[:, None] * (1 - cover)) > _COVERED) & ~moving
    by_step = (number, scene.grid[0], scene.tubelet, 2)
    return {
        "video": video[:, None],
        "moving": moving,
        "still": still,
        "size": size[:, 0],
        "shape": shape[:, 0],
        "position": position.view(by_step).mean(2),
        "velocity": velocity.view(by_step).mean(2),
        "turns": turns,
    }


def _paths(number: int, side: Tensor, scene: Scene, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [n, T, 2] and velocities [n, T, 2] of movers that stay within the frame, and who turns [n]."""
    turns = uniform(number) < 0.5
    angle = uniform(number, 1, high=2 * math.pi)
    turn = torch.where(turns, uniform(number, low=0.25 * math.pi, high=1.75 * math.pi), 0.0)[:, None]
    angles = angle + turn * (torch.arange(scene.frames) >= scene.frames // 2)  # [n, T]
    speed = uniform(number, 1, low=_SPEED[0], high=_SPEED[1])
    velocity = torch.stack([speed * angles.sin(), speed * angles.cos()], -1)  # [n, T, 2]
    path = velocity.cumsum(1) - velocity / 2
    low, high = path.amin(1), path.amax(1)  # [n, 2]
    room = (scene.height - side[:, None] - (high - low)).clamp_min(0)
    start = side[:, None] / 2 - low + room * uniform(number, 2)
    return path + start[:, None], velocity, turns


def _cover(y: Tensor, x: Tensor, side: Tensor, shape: Tensor) -> Tensor:
    """Share of each pixel that an object covers; y and x are distances from its centre. All shapes have one area."""
    shape = shape.view(-1, *[1] * (y.ndim - 1))
    radius = torch.hypot(y, x)
    disc = radius - side / math.sqrt(math.pi)
    square = torch.maximum(y.abs(), x.abs()) - side / 2
    diamond = (y.abs() + x.abs()) / math.sqrt(2) - side / 2
    outer = side * math.sqrt(4 / (3 * math.pi))  # the hole has half the radius
    ring = torch.maximum(radius - outer, outer / 2 - radius)
    distance = torch.stack([disc, square.expand_as(radius), diamond.expand_as(radius), ring])
    chosen = distance.gather(0, shape.expand_as(radius)[None])[0]
    return (0.5 - chosen).clamp(0, 1)


def _carried(texture: Tensor, position: Tensor, scene: Scene) -> Tensor:
    """[n, 2 side, 2 side] textures, and the places [n, T, 2] of what carries them -> [n, T, side, side]."""
    number, side = len(texture), scene.height
    grid = torch.arange(side) + 0.5
    y, x = (grid - position[..., k, None] for k in range(2))  # [n, T, side] within about +- side
    places = torch.stack(
        [x[:, :, None, :].expand(-1, -1, side, -1) / side, y[..., None].expand(-1, -1, -1, side) / side], -1
    )  # [n, T, side, side, 2] in -1 .. 1
    places = places.reshape(number, scene.frames * side, side, 2)
    sampled = torch.nn.functional.grid_sample(texture[:, None], places, align_corners=False, padding_mode="reflection")
    return sampled.view(number, scene.frames, side, side)
