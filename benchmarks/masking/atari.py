"""Clips of three Atari games, with object positions from the game's RAM as labels.

An agent plays random actions. Every fourth frame is kept, without the margins above and below, at half the resolution.
Clips are eight kept frames and do not overlap. Clips of one episode all belong to one split.

Different episodes can still have equal clips, since the games start and serve in few ways. This is rare in Pong. In
Breakout one test clip in ten equals a clip that its probe was trained on.

The RAM addresses are those of the Atari Annotated RAM Interface (Anand et al., "Unsupervised State Representation
Learning in Atari", NeurIPS 2019). The tests compare each with the pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
from common.atomic_files import replacing

CLIP_FRAMES = 8
KEPT_EVERY = 4  # frames of the game for each kept frame
ACTION_FRAMES = 6  # frames of the game for which an action is held
TOP, BOTTOM = 18, 210  # rows of the screen that are kept
HEIGHT, WIDTH = (BOTTOM - TOP) // 2, 160 // 2
ABSENT = -1  # the label of an object that the screen does not show

_LAYOUT = 1  # part of the cache key: raise it when the code makes other clips from the same settings
_EPISODES_OF_A_SPLIT = 2**20  # the first episode of split i has the number i * 2**20


class Label(NamedTuple):
    """Where the RAM holds a coordinate, and when the screen shows the object."""

    address: int
    """RAM address of the coordinate."""
    shown_by: int | None = None
    """RAM address that tells whether the object is shown. None: the object is always shown."""
    first: int = 0
    """Lowest value at `shown_by` with which the object is shown."""
    last: int = 255
    """Highest value at `shown_by` with which the object is shown."""


LABELS = {
    "pong": {
        "player_y": Label(51),
        "enemy_y": Label(50, shown_by=50, first=34),  # the enemy waits above the court until the ball is served
        "ball_x": Label(49, shown_by=54, first=45),  # no ball between a point and the next serve
        "ball_y": Label(54, shown_by=54, first=45),
    },
    "boxing": {
        "player_x": Label(32),
        "player_y": Label(34),
        "enemy_x": Label(33),
        "enemy_y": Label(35),
    },
    "breakout": {
        "ball_x": Label(99, shown_by=101, first=1, last=185),  # 0 before FIRE serves, above 185 below the paddle
        "ball_y": Label(101, shown_by=101, first=1, last=185),
        "player_x": Label(72),
    },
}


class Sizes(NamedTuple):
    """Number of clips of each split."""

    train: int = 6000
    probe_train: int = 2000
    probe_test: int = 2000


@dataclass(frozen=True, eq=False)
class Clips:
    """n clips in the order of play.

    Attributes:
        video: RGB frames, uint8, [n, 3, 8, 96, 80].
        labels: for each name in `LABELS[game]`, the RAM byte at each frame, or ABSENT, int16, [n, 8].
        episode: number of the episode of each clip, int32, [n]. No number is in two splits.
    """

    video: Tensor
    labels: dict[str, Tensor]
    episode: Tensor


class Splits(NamedTuple):
    """Clips for pre-training, for training a probe and for testing the probe."""

    train: Clips
    probe_train: Clips
    probe_test: Clips


def load(game: str, seed: int, sizes: Sizes, folder: Path, *, episode_frames: int = 320) -> Splits:
    """Reads the clips of a game from a file in the folder. The first call plays the game and writes the file.

    Equal arguments give equal clips. A split's clips do not depend on the sizes of the other splits.

    Args:
        game: "pong", "boxing" or "breakout".
        seed: at least 0. Another seed gives other episodes.
        sizes: number of clips of each split.
        folder: made if it does not exist. Each combination of settings and version of ale-py has its own file.
        episode_frames: kept frames after which an episode is cut off.

    Raises:
        ImportError: ale-py is not installed.
        ValueError: unknown game, negative seed or size, or episodes shorter than a clip.
    """
    if game not in LABELS:
        raise ValueError(f"game is {game!r}, must be one of {', '.join(LABELS)}.")
    if seed < 0 or min(sizes) < 0:
        raise ValueError(f"seed is {seed} and sizes are {tuple(sizes)}, none may be negative.")
    if episode_frames < CLIP_FRAMES:
        raise ValueError(f"episode_frames is {episode_frames}, must be at least {CLIP_FRAMES}.")
    settings = {
        "layout": _LAYOUT,
        "game": game,
        "seed": seed,
        "sizes": sizes._asdict(),
        "episode_frames": episode_frames,
        "clip_frames": CLIP_FRAMES,
        "kept_every": KEPT_EVERY,
        "action_frames": ACTION_FRAMES,
        "rows": [TOP, BOTTOM],
        "labels": {name: label._asdict() for name, label in LABELS[game].items()},
        "ale_py": _import_ale_py().__version__,
    }
    text = json.dumps(settings, sort_keys=True)
    path = folder / f"{game}_{seed}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        arrays: dict[str, Any] = {"settings": np.array(text)}
        for index, (split, count) in enumerate(sizes._asdict().items()):
            first = index * _EPISODES_OF_A_SPLIT
            arrays |= {f"{split}/{key}": each for key, each in _make(game, seed, first, count, episode_frames).items()}
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)
    with np.load(path) as stored:
        return Splits(*(_read(stored, split, game) for split in Splits._fields))


def moved(video: Tensor, patch_size: tuple[int, int, int] = (2, 8, 8), *, threshold: int = 16) -> Tensor:
    """Whether a token's pixels change.

    A token has moved if a pixel of the token differs by more than the threshold, in any colour, from the frame before.
    The first frame of a clip has no frame before, so it counts as unchanged.

    Args:
        video: uint8, [n, 3, T, H, W].
        patch_size: frames, rows and columns of a token (t, h, w).
        threshold: in steps of 0 to 255.

    Returns:
        bool, [n, T / t, H / h, W / w].

    Raises:
        ValueError: the patch size does not divide the video.
    """
    shape = video.shape[2:]
    if any(length % patch for length, patch in zip(shape, patch_size, strict=True)):
        raise ValueError(f"patch size {patch_size} does not divide the video's {tuple(shape)}.")
    frames, rows, columns = (length // patch for length, patch in zip(shape, patch_size, strict=True))
    changed = torch.zeros(len(video), *shape, dtype=torch.bool, device=video.device)
    for clip, out in zip(video, changed, strict=True):  # one clip at a time needs little memory
        before, after = clip[:, :-1], clip[:, 1:]
        change = torch.maximum(before, after) - torch.minimum(before, after)  # uint8 holds it
        out[1:] = change.amax(0) > threshold
    tokens = changed.view(-1, frames, patch_size[0], rows, patch_size[1], columns, patch_size[2])
    return tokens.any(6).any(4).any(2)


def _import_ale_py() -> Any:
    """The package ale_py, with its submodule roms."""
    try:
        import ale_py
        import ale_py.roms
    except ImportError as error:
        raise ImportError('Atari clips need ale-py: pip install "adamae_sampler[benchmarks]".') from error
    return ale_py


def _make(game: str, seed: int, first: int, count: int, episode_frames: int) -> dict[str, npt.NDArray[Any]]:
    """Plays episodes, numbered from `first`, until they give `count` clips. Returns the arrays of a split by name."""
    video = np.empty((count, 3, CLIP_FRAMES, HEIGHT, WIDTH), np.uint8)
    labels = {name: np.empty((count, CLIP_FRAMES), np.int16) for name in LABELS[game]}
    episode = np.empty(count, np.int32)
    done = 0
    for number in itertools.count(first):
        if done == count:
            break
        frames, ram = _play(game, seed, number, min(episode_frames, (count - done) * CLIP_FRAMES))
        new = min(len(frames) // CLIP_FRAMES, count - done)
        place, used = slice(done, done + new), new * CLIP_FRAMES
        video[place] = frames[:used].reshape(new, CLIP_FRAMES, HEIGHT, WIDTH, 3).transpose(0, 4, 1, 2, 3)
        for name, label in LABELS[game].items():
            labels[name][place] = _values(label, ram[:used]).reshape(new, CLIP_FRAMES)
        episode[place] = number
        done += new
    return {"video": video, "episode": episode, **{f"labels/{name}": each for name, each in labels.items()}}


def _play(game: str, seed: int, number: int, most: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Plays one episode, to the end of the game or `most` kept frames.

    Returns:
        The kept frames, uint8, [frames, 96, 80, 3], and the RAM at each, uint8, [frames, 128].
    """
    ale_py = _import_ale_py()
    draw = np.random.default_rng([seed, number])
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else each start prints a banner
    console = ale_py.ALEInterface()
    console.setInt("random_seed", int(draw.integers(2**31)))
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(ale_py.roms.get_rom_path(game))
    console.reset_game()
    actions = console.getMinimalActionSet()  # of each of these games, FIRE is among them
    screens, rams = [], []
    for frame in range(most * KEPT_EVERY):
        if frame % ACTION_FRAMES == 0:
            action = actions[draw.integers(len(actions))]
        console.act(action)
        if console.game_over():
            break
        if (frame + 1) % KEPT_EVERY == 0:
            screens.append(_half(console.getScreenRGB()))
            rams.append(console.getRAM())
    return np.stack(screens), np.stack(rams)


def _half(screen: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The kept rows of a screen, uint8, [210, 160, 3], with each 2 x 2 pixels averaged, uint8, [96, 80, 3]."""
    wide = screen[TOP:BOTTOM].astype(np.uint16)
    pairs = wide[::2] + wide[1::2]
    return ((pairs[:, ::2] + pairs[:, 1::2] + 2) // 4).astype(np.uint8)


def _values(label: Label, ram: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """A label at each frame: the RAM byte, or ABSENT."""
    values = ram[:, label.address].astype(np.int16)
    if label.shown_by is not None:
        witness = ram[:, label.shown_by]
        values[(witness < label.first) | (witness > label.last)] = ABSENT
    return values


def _read(stored: Any, split: str, game: str) -> Clips:
    """The clips of a split of an opened file."""
    return Clips(
        video=torch.from_numpy(stored[f"{split}/video"]),
        labels={name: torch.from_numpy(stored[f"{split}/labels/{name}"]) for name in LABELS[game]},
        episode=torch.from_numpy(stored[f"{split}/episode"]),
    )
