"""Clips of three Atari games, with object positions from the game's RAM as labels.

An agent plays random actions. Every fourth frame is kept, without the margins above and below, at half the resolution.
Clips are eight kept frames and do not overlap. Two seeds share no episode.

Different episodes can still have equal clips, since the games start and serve in few ways. This is rare in Pong. In
Breakout one clip in ten equals a clip of another seed. So a readout is scored on the clips that its fit does not have.

The RAM addresses are those of the Atari Annotated RAM Interface (Anand et al., "Unsupervised State Representation
Learning in Atari", NeurIPS 2019). The tests compare each with the pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
from benchmarks.masking.clips import Cut, Labelled
from common.atomic_files import replacing

CLIP_FRAMES = 8
KEPT_EVERY = 4  # frames of the game for each kept frame
ACTION_FRAMES = 6  # frames of the game for which an action is held
TOP, BOTTOM = 18, 210  # rows of the screen that are kept
HEIGHT, WIDTH = (BOTTOM - TOP) // 2, 160 // 2
ABSENT = -1  # the label of an object that the screen does not show

_LAYOUT = 2  # part of the cache key: raise it when the code makes other clips from the same settings


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


@dataclass(frozen=True)
class Target:
    """The object whose tokens the readout looks for. Its centre, in kept pixels, is (label - origin) / 2.

    Attributes:
        name: its labels are name_x and name_y.
        origin_x: of name_x.
        origin_y: of name_y.
    """

    name: str
    origin_x: float
    origin_y: float


TARGETS = {
    "pong": Target("ball", 48, 30),
    "boxing": Target("enemy", -10, -42.5),
    "breakout": Target("ball", 48, 7),
}


@dataclass(frozen=True)
class Game(Cut):
    """Clips of a game, cut into 480 tokens.

    Attributes:
        name: "pong", "boxing" or "breakout".
    """

    name: str = "pong"

    def make(self, number: int, seed: int) -> GameClips:
        """Clips that depend on the arguments alone, made once and kept in torch's cache folder."""
        return load(self, number, seed, Path(torch.hub.get_dir()) / "adamae_sampler")


def game(name: str) -> Game:
    """The clips of a game, as they are made here."""
    return Game(HEIGHT, WIDTH, patch=8, channels=3, sizes=(), frames=CLIP_FRAMES, name=name)


@dataclass(frozen=True, eq=False)
class GameClips(Labelled):
    """n clips in the order of play.

    Attributes:
        labels: the RAM byte of each label in `LABELS[name]` at each frame, or ABSENT, int16, [n, labels, 8].
        episode: number of the episode of each clip, int32, [n].
    """

    labels: Tensor
    episode: Tensor


def load(cut: Game, number: int, seed: int, folder: Path, *, episode_frames: int = 320) -> GameClips:
    """Reads the clips of a game from a file in the folder. The first call plays the game and writes the file.

    Equal arguments give equal clips. Two seeds share no episode, so each split of the data has a seed of its own.

    Args:
        cut: the game.
        number: n.
        seed: at least 0.
        folder: made if it does not exist. Each combination of settings and version of ale-py has its own file.
        episode_frames: kept frames after which an episode is cut off.

    Raises:
        ImportError: ale-py is not installed.
        ValueError: unknown game, negative seed or number, or episodes shorter than a clip.
    """
    if cut.name not in LABELS:
        raise ValueError(f"game is {cut.name!r}, must be one of {', '.join(LABELS)}.")
    if seed < 0 or number < 0:
        raise ValueError(f"seed is {seed} and number is {number}, none may be negative.")
    if episode_frames < CLIP_FRAMES:
        raise ValueError(f"episode_frames is {episode_frames}, must be at least {CLIP_FRAMES}.")
    settings = {
        "layout": _LAYOUT,
        "game": cut.name,
        "seed": seed,
        "number": number,
        "episode_frames": episode_frames,
        "clip_frames": CLIP_FRAMES,
        "kept_every": KEPT_EVERY,
        "action_frames": ACTION_FRAMES,
        "rows": [TOP, BOTTOM],
        "labels": {name: label._asdict() for name, label in LABELS[cut.name].items()},
        "ale_py": _import_ale_py().__version__,
    }
    text = json.dumps(settings, sort_keys=True)
    path = folder / f"{cut.name}_{seed}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        arrays: dict[str, Any] = {"settings": np.array(text), **_make(cut.name, seed, number, episode_frames)}
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)
    with np.load(path) as stored:
        video, labels, episode = (torch.from_numpy(stored[key]) for key in ("video", "labels", "episode"))
    return GameClips(cut, video, target_tokens(cut, labels), labels, episode)


def target_tokens(cut: Game, labels: Tensor) -> Tensor:
    """[n, labels, T] -> [n, N] bool: the tokens that hold the centre of the game's target in one of their frames."""
    target, names = TARGETS[cut.name], list(LABELS[cut.name])
    x, y = (labels[:, names.index(f"{target.name}_{axis}")].double() for axis in "xy")  # [n, T]
    shown = (x != ABSENT) & (y != ABSENT)
    column = ((x - target.origin_x) / 2 / cut.patch).floor().long().clamp(0, cut.grid[2] - 1)
    row = ((y - target.origin_y) / 2 / cut.patch).floor().long().clamp(0, cut.grid[1] - 1)
    step = (torch.arange(cut.frames) // cut.tubelet).expand_as(row)
    token = (step * cut.grid[1] + row) * cut.grid[2] + column
    held = torch.zeros(len(labels), math.prod(cut.grid), dtype=torch.int64)
    return held.scatter_add_(1, token, shown.long()) > 0


def _import_ale_py() -> Any:
    """The package ale_py, with its submodule roms."""
    try:
        import ale_py
        import ale_py.roms
    except ImportError as error:
        raise ImportError('Atari clips need ale-py: pip install "adamae_sampler[benchmarks]".') from error
    return ale_py


def _make(name: str, seed: int, count: int, episode_frames: int) -> dict[str, npt.NDArray[Any]]:
    """Plays episodes until they give `count` clips. Returns the arrays by name."""
    video = np.empty((count, 3, CLIP_FRAMES, HEIGHT, WIDTH), np.uint8)
    labels = np.empty((count, len(LABELS[name]), CLIP_FRAMES), np.int16)
    episode = np.empty(count, np.int32)
    done = 0
    for number in itertools.count():
        if done == count:
            break
        frames, ram = _play(name, seed, number, min(episode_frames, (count - done) * CLIP_FRAMES))
        new = min(len(frames) // CLIP_FRAMES, count - done)
        place, used = slice(done, done + new), new * CLIP_FRAMES
        video[place] = frames[:used].reshape(new, CLIP_FRAMES, HEIGHT, WIDTH, 3).transpose(0, 4, 1, 2, 3)
        for index, label in enumerate(LABELS[name].values()):
            labels[place, index] = _values(label, ram[:used]).reshape(new, CLIP_FRAMES)
        episode[place] = number
        done += new
    return {"video": video, "labels": labels, "episode": episode}


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
