"""Generated clips with known truth: one object moves over a smooth texture, and others of the same look stay still.

A clip has 8 frames of 32 x 32 grey pixels, 256 tokens of 2 x 4 x 4. Textures are 1/f noise. Every object has a shape, a
size of 1 to 16 patches, a texture of its own, and a brightness that differs from the background's by the same amount.
So a single frame does not tell which object moves. Half of the movers change their direction in mid-clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES, SIDE, TUBELET, PATCH = 8, 32, 2, 4  # frames, pixels; and the sizes of a token
GRID = (FRAMES // TUBELET, SIDE // PATCH, SIDE // PATCH)
SIZES = (1, 2, 4, 8, 16)  # area of an object in patches
SHAPES = ("disc", "square", "diamond", "ring")
NUM_STILL = 2
_BANK, _TEXTURES = 128, 256  # pixels of a texture's side; number of textures
_SLOPE = 2.0  # amplitude falls as 1 / frequency ** _SLOPE
_CONTRAST, _OFFSET = 0.10, 0.20  # deviation of textures; brightness of objects, less that of the background
_SPEED = (0.5, 1.5)  # pixels a frame
_COVERED = 0.1  # share of a token's pixels that an object covers, from which the token is the object's
_CHUNK = 256  # clips rendered at a time


@dataclass(frozen=True)
class Clips:
    """Clips and their labels.

    Attributes:
        video: [n, 1, T, H, W] uint8.
        moving: [n, N] bool, tokens of the object that moves.
        still: [n, N] bool, tokens of objects that do not, without those of the mover.
        size: [n], index into SIZES.
        shape: [n], index into SHAPES.
        position: [n, T', 2] fp32, centre of the mover (y, x) in pixels, mean over the frames of a time step.
        velocity: [n, T', 2] fp32, pixels a frame (y, x), mean over the frames of a time step.
        turns: [n] bool, whether the mover changes its direction.
    """

    video: Tensor
    moving: Tensor
    still: Tensor
    size: Tensor
    shape: Tensor
    position: Tensor
    velocity: Tensor
    turns: Tensor

    def __len__(self) -> int:
        return len(self.video)

    def first(self, number: int) -> Clips:
        """The first of them."""
        return Clips(*(each[:number] for each in vars(self).values()))

    def by_size(self) -> list[Tensor]:
        """Which clips [n]: all, then those with a mover of each size. Sizes that no clip has are left out."""
        chosen = [torch.ones_like(self.turns), *(self.size == k for k in range(len(SIZES)))]
        return [each for each in chosen if each.any()]

    def to(self, device: torch.device) -> Clips:
        """The same clips on a device."""
        return Clips(*(each.to(device) for each in vars(self).values()))


def make_clips(number: int, seed: int, sizes: tuple[int, ...] = SIZES) -> Clips:
    """Clips that depend on the arguments alone.

    Args:
        number: n.
        seed: of everything.
        sizes: the sizes that movers have, each equally often in the mean; the still objects take any of SIZES.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = textures(generator)
    parts = [_render(min(_CHUNK, number - at), bank, sizes, generator) for at in range(0, number, _CHUNK)]
    return Clips(*(torch.cat(each) for each in zip(*parts, strict=True)))


def textures(generator: torch.Generator) -> Tensor:
    """[textures, side, side] fp32 1/f noise that wraps around, with mean 0 and deviation 1."""
    white = torch.randn(_TEXTURES, _BANK, _BANK, generator=generator)
    y, x = torch.fft.fftfreq(_BANK)[:, None], torch.fft.rfftfreq(_BANK)
    frequency = torch.hypot(y, x) * _BANK
    amplitude = frequency.clamp_min(1) ** -_SLOPE
    amplitude[0, 0] = 0  # no mean
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(_BANK, _BANK))
    return noise / noise.std(dim=(1, 2), keepdim=True)


def _render(number: int, bank: Tensor, sizes: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    choices = torch.tensor([SIZES.index(size) for size in sizes])
    size = torch.cat([choices[integers(len(sizes), number, 1)], integers(len(SIZES), number, NUM_STILL)], 1)
    side = torch.tensor(SIZES).sqrt()[size] * PATCH  # [n, 1 + still], the mover first
    shape = integers(len(SHAPES), number, 1 + NUM_STILL)
    offset = torch.where(uniform(number, 1 + NUM_STILL) < 0.5, -_OFFSET, _OFFSET)

    position, velocity, turns = _paths(number, side[:, 0], uniform)
    centre = uniform(number, NUM_STILL, 2) * (SIDE - side[:, 1:, None]) + side[:, 1:, None] / 2

    pixel = torch.arange(SIDE) + 0.5

    def crop(width: int) -> Tensor:  # [n, width, width], of random textures at random places
        rows, columns = (integers(_BANK, number, 1) + torch.arange(width) for _ in range(2))
        which = integers(_TEXTURES, number)
        return bank[which[:, None, None], rows[:, :, None] % _BANK, columns[:, None, :] % _BANK]

    frame = 0.5 + _CONTRAST * crop(SIDE)
    still_cover = torch.zeros(number, SIDE, SIDE)
    for k in range(NUM_STILL):
        at = pixel - centre[:, k, :, None]  # [n, 2, side]
        cover = _cover(at[:, 0, :, None], at[:, 1, None, :], side[:, 1 + k, None, None], shape[:, 1 + k])
        look = 0.5 + offset[:, 1 + k, None, None] + _CONTRAST * crop(SIDE)
        frame = torch.lerp(frame, look, cover)
        still_cover = torch.maximum(still_cover, cover)

    at = pixel - position[..., None]  # [n, T, 2, side]
    cover = _cover(at[:, :, 0, :, None], at[:, :, 1, None, :], side[:, :1, None, None], shape[:, 0])
    look = 0.5 + offset[:, :1, None, None] + _CONTRAST * _carried(crop(2 * SIDE), position)
    video = torch.lerp(frame[:, None], look, cover).clamp(0, 1).mul(255).round().to(torch.uint8)

    def of_tokens(x: Tensor) -> Tensor:  # [n, T, side, side] -> [n, N] share
        return x.reshape(number, GRID[0], TUBELET, GRID[1], PATCH, GRID[2], PATCH).mean((2, 4, 6)).flatten(1)

    moving = of_tokens(cover) > _COVERED
    still = (of_tokens(still_cover[:, None] * (1 - cover)) > _COVERED) & ~moving
    by_step = (number, GRID[0], TUBELET, 2)
    return (
        video[:, None],
        moving,
        still,
        size[:, 0],
        shape[:, 0],
        position.view(by_step).mean(2),
        velocity.view(by_step).mean(2),
        turns,
    )


def _paths(number: int, side: Tensor, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [n, T, 2] and velocities [n, T, 2] of movers that stay within the frame, and who turns [n]."""
    turns = uniform(number) < 0.5
    angle = uniform(number, 1, high=2 * math.pi)
    turn = torch.where(turns, uniform(number, low=0.25 * math.pi, high=1.75 * math.pi), 0.0)[:, None]
    angles = angle + turn * (torch.arange(FRAMES) >= FRAMES // 2)  # [n, T]
    speed = uniform(number, 1, low=_SPEED[0], high=_SPEED[1])
    velocity = torch.stack([speed * angles.sin(), speed * angles.cos()], -1)  # [n, T, 2]
    path = velocity.cumsum(1) - velocity / 2
    low, high = path.amin(1), path.amax(1)  # [n, 2]
    room = (SIDE - side[:, None] - (high - low)).clamp_min(0)
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


def _carried(texture: Tensor, position: Tensor) -> Tensor:
    """[n, 2 side, 2 side] textures, and the places [n, T, 2] of what carries them -> [n, T, side, side]."""
    number = len(texture)
    grid = torch.arange(SIDE) + 0.5
    y, x = (grid - position[..., k, None] for k in range(2))  # [n, T, side] within about +- SIDE
    places = torch.stack(
        [x[:, :, None, :].expand(-1, -1, SIDE, -1) / SIDE, y[..., None].expand(-1, -1, -1, SIDE) / SIDE], -1
    )  # [n, T, side, side, 2] in -1 .. 1
    sampled = torch.nn.functional.grid_sample(
        texture[:, None], places.reshape(number, FRAMES * SIDE, SIDE, 2), align_corners=False, padding_mode="reflection"
    )
    return sampled.view(number, FRAMES, SIDE, SIDE)
