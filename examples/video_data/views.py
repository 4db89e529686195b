"""Evaluation views: fixed clips and crops of each video, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from common.settings import FrameSampling
from video_data.clips import VideoClips
from video_data.frame_sampling import fixed_clips, random_clip
from video_data.reader_processes import video_loader
from video_data.transforms import fixed_crops
from video_data.video_files import VideoError
from video_data.video_lists import VideoEntry


class ViewSource(Protocol):
    """A finite set of videos that gives fixed views for evaluation."""

    def __len__(self) -> int: ...

    def views(self, index: int) -> dict[str, Any]:
        """{"video": [V, C, T, H, W] uint8, "label": int}; raises VideoError if the video cannot be read."""
        ...


class VideoViews:
    """Fixed clips and crops of videos, for evaluation. A video is decoded once for all views.

    Args:
        entries: the videos.
        num_frames: T, frames of a clip.
        stride: distance between two frames of a clip, in frames of the video.
        img_size: height and width of a crop.
        sampling: the rule that chooses the frames of a clip.
        clips: number of clips of a video.
        crops: number of crops of a clip.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        num_frames: int,
        stride: int,
        img_size: tuple[int, int],
        sampling: FrameSampling = "dense",
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

        def choose(available: int) -> list[list[int]]:
            return fixed_clips(self.sampling, available, self.num_frames, self.stride, self.num_clips)

        frames, clips = entry.read_clips(choose)
        crops = fixed_crops(frames, self.img_size, self.num_crops)
        views = [crop[places] for places in clips for crop in crops]
        return {"video": torch.stack(views).transpose(1, 2), "label": entry.label}


class RandomViews:
    """Random clips of videos, for features of a frozen encoder. Each clip has random frames and a random transform.

    The clips of a video follow from the seed and its index. A video is decoded once for all of them.

    Args:
        source: the videos, and what a random clip of them is.
        clips: number of clips of a video.
        seed: seed of every random choice.
    """

    def __init__(self, source: VideoClips, clips: int, seed: int) -> None:
        self.source = source
        self.num_clips = clips
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def views(self, index: int) -> dict[str, Any]:
        """All clips of video `index`: {"video": [V, C, T, H, W] uint8, "label": int}."""
        entry, of = self.source.entries[index], self.source
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def choose(available: int) -> list[list[int]]:
            sizes = (of.sampling, available, of.num_frames, of.stride)
            return [random_clip(*sizes, generator) for _ in range(self.num_clips)]

        frames, clips = entry.read_clips(choose)
        views = [of.transform(frames[places], generator) for places in clips]
        return {"video": torch.stack(views).transpose(1, 2), "label": entry.label}


class ViewSet(Dataset[dict[str, Any]]):
    """The views of a source as a torch dataset. A video that cannot be read becomes a message in `left_out`."""

    def __init__(self, source: ViewSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {**self.source.views(index), "index": index, "left_out": []}
        except VideoError as error:
            return {"left_out": [str(error)]}


def collate_views(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the readable videos: {"video": [B, V, C, T, H, W], "label": [B], "index": [B], "left_out": messages}.

    If no video of the batch is readable, "left_out" is the only key.
    """
    left_out = [message for item in items for message in item["left_out"]]
    read = [{name: item[name] for name in ("video", "label", "index")} for item in items if "video" in item]
    return {**(default_collate(read) if read else {}), "left_out": left_out}


def view_loader(source: ViewSource, batches: Sequence[Sequence[int]], workers: int) -> DataLoader:
    """Batches of all views of videos (see `collate_views`).

    Args:
        source: the videos.
        batches: indices of the videos of each batch.
        workers: processes that read videos.
    """
    return video_loader(ViewSet(source), collate_views, workers, batch_sampler=batches)
