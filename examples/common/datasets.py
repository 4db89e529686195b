"""Where clips come from: video files or sprites; an endless, reproducible stream for training, fixed views for
evaluation.

A source gives clips of video `index` for a random generator, and its views without one. `ClipStream` decides which
video stands at which position of a run and seeds the generator by position, so that a run is the same for any number
of workers, and resumes by its position.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from common.lists import VideoEntry
from common.sampling import Sampling, fixed_clips, random_clip
from common.sprites import Sprites
from common.transforms import fixed_crops
from common.video import Unreachable, Video, VideoError

_REPLACEMENTS = 20  # how many other clips stand in for one that cannot be read before the run gives up
_PAUSES = (0.1, 0.4)  # seconds before trying a video once more, and again: file systems over a network have bad moments
_OUTAGE = (1, 2, 4, 8, 16, 32, 60)  # seconds likewise, where it is the place of the videos that cannot be reached
_KEPT_BYTES = 2**29  # of sprites

Transform = Callable[[Tensor, torch.Generator], Tensor]


class ClipSource(Protocol):
    """A finite set of videos that gives clips for training."""

    def __len__(self) -> int: ...

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """{"video": [R, C, T, H, W] uint8, "label": [R] int64}; raises VideoError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What to call a video in reports and in the quarantine file; another one for each."""
        ...

    def key(self, index: int) -> str:
        """What makes it this video of the data set, wherever its file is."""
        ...


class ViewSource(Protocol):
    """A finite set of videos that gives fixed views for evaluation."""

    def __len__(self) -> int: ...

    def views(self, index: int) -> dict[str, Any]:
        """{"video": [V, C, T, H, W] uint8, "label": int}; raises VideoError if it cannot be read."""
        ...


class VideoClips:
    """Random clips of videos.

    Args:
        entries: the videos.
        num_frames: T, frames of a clip.
        stride: distance of two frames of a clip in frames of the video.
        transform: what is done to the frames, [T, C, H, W] to the same of another size.
        sampling: which frames a clip takes.
        repeats: R, clips of one video, which differ in what the transform draws.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        num_frames: int,
        stride: int,
        transform: Transform,
        sampling: Sampling = "dense",
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
        """The video's path, and its part if it has one."""
        return self.entries[index].name

    def key(self, index: int) -> str:
        """The name of its file, its part and its label."""
        entry = self.entries[index]
        return f"{os.path.basename(entry.name)} {entry.label}"

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """R random clips of video `index`: {"video": [R, C, T, H, W] uint8, "label": [R]}."""
        entry = self.entries[index]
        try:
            with entry.open() as video:
                places = random_clip(self.sampling, _available(video, entry), self.num_frames, self.stride, generator)
                frames = video.read([entry.start + place for place in places])  # [T, C, H, W]
        except VideoError as error:
            raise type(error)(f"{entry.where}: {error}") from error
        clips = [self.transform(frames, generator) for _ in range(self.repeats)]
        return {"video": torch.stack(clips).transpose(1, 2), "label": torch.full((self.repeats,), entry.label)}


class VideoViews:
    """Fixed clips and crops of videos, for evaluation; a video is decoded once for all of them.

    Args:
        entries: the videos.
        num_frames: T, frames of a clip.
        stride: distance of two frames of a clip in frames of the video.
        img_size: height and width of a crop.
        sampling: which frames a clip takes.
        clips: clips of a video.
        crops: crops of a clip.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        num_frames: int,
        stride: int,
        img_size: tuple[int, int],
        sampling: Sampling = "dense",
        clips: int = 1,
        crops: int = 1,
    ) -> None:
        self.entries = entries
        self.num_frames = num_frames
        self.stride = stride
        self.img_size = img_size
        self.sampling = sampling
        self.num_clips = clips
        self.num_crops = crops

    def __len__(self) -> int:
        return len(self.entries)

    def views(self, index: int) -> dict[str, Any]:
        """All views of video `index`, clip by clip: {"video": [V, C, T, H, W] uint8, "label": int}."""
        entry = self.entries[index]
        try:
            with entry.open() as video:
                available = _available(video, entry)
                clips = fixed_clips(self.sampling, available, self.num_frames, self.stride, self.num_clips)
                wanted = sorted({place for clip in clips for place in clip})
                frames = video.read([entry.start + place for place in wanted])  # [distinct, C, H, W]
        except VideoError as error:
            raise VideoError(f"{entry.where}: {error}") from error
        crops = fixed_crops(frames, self.img_size, self.num_crops)
        at = {place: number for number, place in enumerate(wanted)}
        views = [crop[[at[place] for place in clip]] for clip in clips for crop in crops]
        return {"video": torch.stack(views).transpose(1, 2), "label": entry.label}


def _available(video: Video, entry: VideoEntry) -> int:
    """Frames of the part of a video that its entry names."""
    available = video.count() - entry.start
    return available if entry.frames is None else min(available, entry.frames)


class SpriteClips:
    """`Sprites` as a source of clips and of views. A sprite clip is one fixed clip, repeated where several are wanted.

    Clips are kept once made, if all of them fit into half a gigabyte: making one takes as long as a small model's step.

    Args:
        sprites: the clips.
        repeats: R, how often a clip is given for training.
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
        """Its number, length and seed of its data set."""
        return f"sprites:{len(self)}:{self.sprites.seed}[{index}]"

    def key(self, index: int) -> str:
        """Its name."""
        return self.name(index)

    def clips(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Clip `index`, R times, without any randomness."""
        clip = self._clip(index)
        video = clip["video"].expand(self.repeats, -1, -1, -1, -1)
        return {"video": video, "label": torch.full((self.repeats,), clip["label"])}

    def views(self, index: int) -> dict[str, Any]:
        """Clip `index`, its one view."""
        clip = self._clip(index)
        return {"video": clip["video"][None], "label": clip["label"]}

    def _clip(self, index: int) -> dict[str, Any]:
        clip = self._kept.get(index) or self.sprites[index]
        if self._keep:
            self._kept[index] = clip
        return clip


def digest(source: ClipSource) -> str:
    """Tells data sets apart by their videos' names, parts and labels, in their order, wherever they are."""
    keys = "\n".join(source.key(index) for index in range(len(source)))
    return hashlib.sha256(keys.encode()).hexdigest()


class ClipStream(Dataset[dict[str, Any]]):
    """Positions `start` .. `stop` of an endless run over a source: epoch after epoch, each in its own order.

    A video that cannot be read is tried again, then replaced by another one, chosen by position too, and reported in
    the item's `left_out`. Whether a clip can be read may depend on its frames, so a video that is known to be broken
    is tried too, but once: what stands at a position does not depend on what was read before it.

    Args:
        source: the clips.
        start: first position, a resumed run's number of videos so far.
        stop: one past the last position.
        seed: of the order and of every random choice within clips.
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
        """See `digest`."""
        return digest(self.source)

    def names(self, start: int, stop: int) -> list[str]:
        """The videos at positions of the run, before any replacement."""
        return [self.source.name(self._index(position)) for position in range(start, stop)]

    def _read(self, index: int, generator: torch.Generator) -> dict[str, Any] | str:
        """The clips of a video, or why it cannot be read; then the generator is as before."""
        before, name = generator.get_state(), self.source.name(index)
        pauses: Iterator[float] = iter(() if name in self.broken else _PAUSES)
        outage: Iterator[float] = iter(_OUTAGE)
        while True:
            try:
                return self.source.clips(index, generator)
            except Unreachable as error:
                pause = next(outage, None)
                if pause is None:
                    raise VideoError(f"{error}, for {sum(_OUTAGE)} seconds") from error
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


class ViewSet(Dataset[dict[str, Any]]):
    """The views of a source, for a DataLoader; what cannot be read becomes a message in the place of a video."""

    def __init__(self, source: ViewSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self.source.views(index), "index": index, "left_out": []}
        except VideoError as error:
            return {"left_out": [str(error)]}


def collate_clips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the clips of several videos: {"video": [B R, C, T, H, W], "label": [B R], "left_out": {name: why}}."""
    return {
        "video": torch.cat([item["video"] for item in items]),
        "label": torch.cat([item["label"] for item in items]),
        "left_out": {name: why for item in items for name, why in item["left_out"].items()},
    }


def collate_views(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks what could be read: {"video": [B, V, C, T, H, W], "label": [B], "index": [B], "left_out": messages}.

    Without "video" where nothing could be.
    """
    left_out = [message for item in items for message in item["left_out"]]
    read = [{name: item[name] for name in ("video", "label", "index")} for item in items if "video" in item]
    return {**(default_collate(read) if read else {}), "left_out": left_out}
