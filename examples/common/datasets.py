"""Where clips come from: video files or sprites, as one endless, reproducible stream.

A source gives clip `index` for a random generator. `ClipStream` decides which clip stands at which position of a run
and seeds the generator by position, so that a run is the same for any number of workers, and resumes by its position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, default_collate

from common.sprites import Sprites
from common.transforms import multi_scale_crop, random_flip
from common.video import Video, VideoError, clip_indices

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v")
_REPLACEMENTS = 20  # how many other clips stand in for one that cannot be read before the run gives up


class ClipSource(Protocol):
    """A finite set of clips."""

    def __len__(self) -> int: ...

    def clip(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """{"video": [C, T, H, W] uint8, "label": int}; raises VideoError if it cannot be read."""
        ...


@dataclass(frozen=True)
class VideoEntry:
    """One video of a list. `frames` is None for all from `start` on; `where` names it in messages."""

    path: Path
    label: int = -1
    start: int = 0
    frames: int | None = None
    where: str = ""


def list_videos(data: Path) -> list[VideoEntry]:
    """The videos of a folder (searched through, sorted) or of a list file.

    A line of a list is `path label` or `path start frames label`, as VideoMAE's; `frames` below 1 means to the end. A
    relative path is relative to the list's folder. Empty lines and lines that start with # are passed over.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: a line of another form, named with its number, or no video at all.
    """
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        entries = [VideoEntry(path, where=str(path)) for path in found]
    elif data.is_file():
        lines = enumerate(data.read_text(encoding="utf-8").splitlines(), start=1)
        entries = [
            _parse_line(data, n, line) for n, line in lines if line.strip() and not line.lstrip().startswith("#")
        ]
    else:
        raise FileNotFoundError(f"--data {data}: no such folder or list file. 'sprites' needs no data at all.")
    if not entries:
        raise ValueError(f"--data {data} has no video; looked for {', '.join(VIDEO_SUFFIXES)} or lines of a list.")
    return entries


def _parse_line(data: Path, number: int, line: str) -> VideoEntry:
    # From the right, since paths may have spaces.
    long = re.fullmatch(r"\s*(\S.*?)\s+(\d+)\s+(-?\d+)\s+(-?\d+)\s*", line)
    short = re.fullmatch(r"\s*(\S.*?)\s+(-?\d+)\s*", line)
    if long:
        path, (start, frames, label) = long[1], map(int, long.groups()[1:])
    elif short and not re.search(r"\s-?\d+$", short[1]):  # two numbers: a line that lacks one
        path, start, frames, label = short[1], 0, 0, int(short[2])
    else:
        raise ValueError(f"{data}:{number}: {line!r}, expected 'path label' or 'path start frames label'.")
    video = Path(path)
    return VideoEntry(
        path=video if video.is_absolute() else data.parent / video,
        label=label,
        start=start,
        frames=frames if frames > 0 else None,
        where=f"{data}:{number} ({video})",
    )


class VideoClips:
    """Random clips of videos: frames at a stride, MultiScaleCrop, and a flip where wanted.

    Args:
        entries: the videos.
        num_frames: T, frames of a clip.
        stride: distance of two frames of a clip in frames of the video.
        img_size: height and width of a clip.
        flip: mirror half of the clips.
    """

    def __init__(
        self, entries: Sequence[VideoEntry], num_frames: int, stride: int, img_size: tuple[int, int], flip: bool
    ) -> None:
        self.entries = entries
        self.num_frames = num_frames
        self.stride = stride
        self.img_size = img_size
        self.flip = flip

    def __len__(self) -> int:
        return len(self.entries)

    def clip(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One random clip of video `index`: {"video": [C, T, H, W] uint8, "label": int}."""
        entry = self.entries[index]
        try:
            with Video(entry.path) as video:
                available = video.count() - entry.start
                if entry.frames is not None:
                    available = min(available, entry.frames)
                places = clip_indices(available, self.num_frames, self.stride, generator)
                frames = video.read([entry.start + place for place in places])  # [T, C, H, W]
        except VideoError as error:
            raise VideoError(f"{entry.where}: {error}") from error
        frames = multi_scale_crop(frames, self.img_size, generator)
        if self.flip:
            frames = random_flip(frames, generator)
        return {"video": frames.transpose(0, 1).contiguous(), "label": entry.label}


class SpriteClips:
    """`Sprites` as a source; the generator is not used, since a sprite clip is one fixed clip."""

    def __init__(self, sprites: Sprites) -> None:
        self.sprites = sprites

    def __len__(self) -> int:
        return len(self.sprites)

    def clip(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Clip `index`, with its token mask `moving`."""
        return self.sprites[index]


class ClipStream(Dataset[dict[str, Any]]):
    """Positions `start` .. `stop` of an endless run over a source: epoch after epoch, each in its own order.

    A clip that cannot be read is replaced by another one, chosen by position too, and reported in the item's
    `left_out`.

    Args:
        source: the clips.
        start: first position, a resumed run's number of clips so far.
        stop: one past the last position.
        seed: of the order and of every random choice within clips.
    """

    def __init__(self, source: ClipSource, start: int, stop: int, seed: int) -> None:
        self.source = source
        self.start = start
        self.stop = stop
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = self.start + item
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        index = self._index(position)
        left_out: list[str] = []
        for _ in range(_REPLACEMENTS):
            try:
                return {**self.source.clip(index, generator), "left_out": left_out}
            except VideoError as error:
                left_out.append(str(error))
                index = int(torch.randint(len(self.source), (), generator=generator))
        raise VideoError(
            f"{_REPLACEMENTS} clips in a row could not be read:\n  " + "\n  ".join(dict.fromkeys(left_out))
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + epoch)
            self._order = (epoch, torch.randperm(len(self.source), generator=generator).tolist())
        return self._order[1][place]


def collate_clips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks what are tensors and numbers, and joins the lists of what was left out."""
    left_out = [message for item in items for message in item.pop("left_out")]
    return {**default_collate(items), "left_out": left_out}


def make_source(
    data: str,
    *,
    num_frames: int,
    stride: int,
    img_size: tuple[int, int],
    patch_size: int,
    tubelet_size: int,
    flip: bool,
    seed: int,
) -> ClipSource:
    """The source that `--data` names: 'sprites', a folder, or a list file; one without clips for an empty string."""
    if not data:
        return VideoClips([], num_frames, stride, img_size, flip)
    if data == "sprites":
        if img_size[0] != img_size[1]:
            raise ValueError(f"sprites are square, img_size is {img_size}; use --img-size 64 64, for example.")
        return SpriteClips(Sprites(10_000, num_frames, img_size[0], patch_size, tubelet_size, seed))
    return VideoClips(list_videos(Path(data)), num_frames, stride, img_size, flip)
