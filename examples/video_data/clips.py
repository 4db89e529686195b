"""Training clips: from a video file to the batches of a run.

`VideoClips` reads the frames of a video and makes clips of them. `ClipStream` puts the videos in the order of a run and
seeds every random choice by position. So a run is the same for any number of readers, and resumes by position.
`clip_loader` makes batches of the stream for the training loop.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from common.settings import FrameSampling
from video_data.frame_sampling import random_clip
from video_data.reader_processes import video_loader
from video_data.sprites import Sprites
from video_data.transforms import Transform
from video_data.video_files import Unreachable, VideoError
from video_data.video_lists import VideoEntry

_REPLACEMENTS = 20  # other videos to try for an unreadable one before the run ends
_PAUSES = (0.1, 0.4)  # seconds before each new try of a video, since network file systems fail now and then
_OUTAGE = (1, 2, 4, 8, 16, 32, 60)  # seconds before each new try while the server is unreachable
_KEPT_BYTES = 2**29  # most memory for cached sprites


class ClipSource(Protocol):
    """A finite set of videos that gives clips for training."""

    def __len__(self) -> int: ...

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """{"video": [R, C, T, H, W] uint8, "label": [R] int64}; raises VideoError if the video cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The name of a video in reports and quarantine.txt; no other video of the source has it."""
        ...

    def key(self, index: int) -> str:
        """Identifies a video of the data set. It does not depend on the folder of the file."""
        ...


class VideoClips:
    """Random clips of videos.

    Args:
        entries: the videos.
        num_frames: T, frames of a clip.
        stride: distance between two frames of a clip, in frames of the video.
        transform: crops and augments frames [T, C, H, W], with random numbers of the generator.
        sampling: the rule that chooses the frames of a clip.
        repeats: R, clips of one video: the same frames, each time transformed with other random numbers.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        num_frames: int,
        stride: int,
        transform: Transform,
        sampling: FrameSampling = "dense",
        repeats: int = 1,
    ) -> None:
        self.entries = entries
        self.num_frames = num_frames
        self.stride = stride
        self.transform = transform
        self.sampling = sampling
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """The path of the video, and the part if the list gives one."""
        return self.entries[index].name

    def key(self, index: int) -> str:
        """The file name, the part and the label of the video."""
        entry = self.entries[index]
        return f"{os.path.basename(entry.name)} {entry.label}"

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """R random clips of video `index`: {"video": [R, C, T, H, W] uint8, "label": [R]}."""
        entry = self.entries[index]
        sizes = self.num_frames, self.stride
        distinct, (places,) = entry.read_clips(
            lambda available: [random_clip(self.sampling, available, *sizes, generator)]
        )
        frames = distinct if len(distinct) == len(places) else distinct[places]  # [T, C, H, W]; short videos repeat
        clips = [self.transform(frames, generator) for _ in range(self.repeats)]  # cropped and flipped
        return {"video": torch.stack(clips).transpose(1, 2), "label": torch.full((self.repeats,), entry.label)}


class SpriteClips:
    """`Sprites` as a source of clips for training and of views for evaluation.

    Each sprite is one fixed clip. Clips are cached if all of them fit into half a gigabyte, since making a clip takes
    as long as a step of a small model.

    Args:
        sprites: the clips.
        repeats: R, copies of a clip in training.
    """

    def __init__(self, sprites: Sprites, repeats: int = 1) -> None:
        self.sprites = sprites
        self.repeats = repeats
        clip_bytes = 3 * sprites.num_frames * sprites.img_size**2
        self._keep = len(sprites) * clip_bytes <= _KEPT_BYTES
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.sprites)

    def name(self, index: int) -> str:
        """The number of the clip, with length and seed of the data set."""
        return f"sprites:{len(self)}:{self.sprites.seed}[{index}]"

    def key(self, index: int) -> str:
        """The name of the clip, and the version of what such a name stands for."""
        return f"{self.name(index)} v{self.sprites.version}"

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Clip `index`, R times; nothing is random."""
        clip = self._clip(index)
        video = clip["video"].expand(self.repeats, -1, -1, -1, -1)
        return {"video": video, "label": torch.full((self.repeats,), clip["label"])}

    def views(self, index: int) -> dict[str, Any]:
        """The one view of clip `index`."""
        clip = self._clip(index)
        return {"video": clip["video"][None], "label": clip["label"]}

    def _clip(self, index: int) -> dict[str, Any]:
        clip = self._kept.get(index) or self.sprites[index]
        if self._keep:
            self._kept[index] = clip
        return clip


def digest(source: ClipSource) -> str:
    """A hash of the names, parts and labels of the videos, in order. It does not depend on their folders."""
    keys = "\n".join(source.key(index) for index in range(len(source)))
    return hashlib.sha256(keys.encode()).hexdigest()


class ClipStream(Dataset[dict[str, Any]]):
    """Positions `start` .. `stop` of an endless run over a source: epoch after epoch, each in its own order.

    A video that cannot be read is tried again. Then another video, chosen by position, takes its place, and the item's
    `left_out` reports the unreadable one. A video that is known to be broken is still tried once, since other frames of
    it may be readable. So the clip at a position never depends on the clips that were read before.

    Args:
        source: the clips.
        start: first position; in a resumed run, the number of videos before it.
        stop: one past the last position.
        seed: seed of the order and of every random choice within clips.
        broken: names of videos that are known to be broken.
    """

    def __init__(self, source: ClipSource, start: int, stop: int, seed: int, broken: Iterable[str] = ()) -> None:
        self.source = source
        self.start = start
        self.stop = stop
        self.seed = seed
        self.broken = set(broken)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = self.start + item
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
        index = self._index(position)
        left_out: dict[str, str] = {}
        for _ in range(_REPLACEMENTS):
            clips = self._read(index, generator)
            if not isinstance(clips, str):
                return {**clips, "left_out": left_out}
            left_out[self.source.name(index)] = clips
            index = int(torch.randint(len(self.source), (), generator=generator))
        causes = "\n  ".join([*left_out.values()][:8])
        raise VideoError(f"{_REPLACEMENTS} videos in a row could not be read:\n  {causes}")

    @cached_property
    def digest(self) -> str:
        """The `digest` of the source."""
        return digest(self.source)

    def names(self, start: int, stop: int) -> list[str]:
        """The videos at positions of the run, before any replacement."""
        return [self.source.name(self._index(position)) for position in range(start, stop)]

    def _read(self, index: int, generator: torch.Generator) -> dict[str, Any] | str:
        """The clips of a video, or the reason why it cannot be read. On failure the generator is as before."""
        before, name = generator.get_state(), self.source.name(index)
        pauses: Iterator[float] = iter(() if name in self.broken else _PAUSES)
        outage: Iterator[float] = iter(_OUTAGE)
        while True:
            try:
                return self.source.clips(index, generator)
            except Unreachable as error:
                pause = next(outage, None)
                if pause is None:
                    raise VideoError(f"{error}; tried for {sum(_OUTAGE)} seconds") from error
            except VideoError as error:
                pause = next(pauses, None)
                if pause is None:
                    self.broken.add(name)
                    generator.set_state(before)
                    return str(error)
            generator.set_state(before)
            time.sleep(pause)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + epoch)
            self._order = (epoch, torch.randperm(len(self.source), generator=generator).tolist())
        return self._order[1][place]


def collate_clips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the clips of several videos: {"video": [B R, C, T, H, W], "label": [B R], "left_out": {name: why}}."""
    return {
        "video": torch.cat([item["video"] for item in items]),
        "label": torch.cat([item["label"] for item in items]),
        "left_out": {name: why for item in items for name, why in item["left_out"].items()},
    }


def clip_loader(stream: ClipStream, batch_size: int, workers: int) -> DataLoader:
    """Batches of `batch_size` videos (see `collate_clips`), in the order of the stream; `workers` processes read."""
    return video_loader(stream, collate_clips, workers, batch_size=batch_size)
