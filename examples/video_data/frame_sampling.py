"""The frames of a clip. A video of any length gives a clip; a short video repeats frames.

Dense (I3D's, for Kinetics, UCF101 and HMDB51): frames at a fixed stride from one start. A clip of T frames takes
T x stride frames of the video, as in the official code. A shorter video gives the frames that it has at this stride,
then repeats the last of them.

Segments (TSN's, for Something-Something): the video is cut into equal segments, one for each frame of a clip. Each
segment gives one frame, and the stride has no effect. A video with fewer frames than segments repeats each frame about
equally often.
"""

from __future__ import annotations

import math

import torch

from common.settings import FrameSampling
from video_data.video_files import VideoError


def random_clip(
    sampling: FrameSampling, available: int, num_frames: int, stride: int, generator: torch.Generator
) -> list[int]:
    """The frames of a training clip, in ascending order, from a video with `available` frames.

    Dense: every start that fits is equally likely. Segments: every frame of a segment is equally likely.
    """
    _check(available)
    if sampling == "dense":
        last = max(available - num_frames * stride, 0)
        start = int(torch.randint(last + 1, (), generator=generator))
        return _dense(start, available, num_frames, stride)
    places = torch.rand(num_frames, generator=generator, dtype=torch.float64).tolist()
    return _segments(places, available, num_frames)


def fixed_clips(sampling: FrameSampling, available: int, num_frames: int, stride: int, clips: int) -> list[list[int]]:
    """The frames of each of `clips` fixed clips of a video, for evaluation.

    Dense: of the frames 0, stride, 2 stride and so on, starts are spread evenly from the first to the last from which a
    clip fits. A single clip takes the middle start.
    Segments: each clip takes another place within the segments, such as beginning and middle for two clips. A single
    clip takes the middle.
    """
    _check(available)
    if sampling == "dense":
        last = max(-(-available // stride) - num_frames, 0)  # in strides
        starts = [last // 2] if clips == 1 else [last * clip // (clips - 1) for clip in range(clips)]
        return [_dense(start * stride, available, num_frames, stride) for start in starts]
    places = [0.5] if clips == 1 else [clip / clips for clip in range(clips)]
    return [_segments([place] * num_frames, available, num_frames) for place in places]


def _check(available: int) -> None:
    if available < 1:
        raise VideoError("it has no frames")


def _dense(start: int, available: int, num_frames: int, stride: int) -> list[int]:
    last = (available - 1 - start) // stride
    return [start + min(step, last) * stride for step in range(num_frames)]


def _segments(places: list[float], available: int, num_frames: int) -> list[int]:
    """One frame of each segment; `places` in [0, 1) are the places within the segments."""
    return [math.floor((segment + place) * available / num_frames) for segment, place in enumerate(places)]
