"""Reading frames from video files, and which frames a clip takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import av
import torch
from torch import Tensor

# Containers often count a frame or two more than their stream decodes to; more missing than that is a broken file.
_MISSING_AT_END = 2


class VideoError(RuntimeError):
    """A video that cannot be read; the message says why, without the path."""


def clip_indices(available: int, num_frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """The frames of one training clip: `num_frames` of them, `stride` apart, from a uniformly random start.

    A video too short for that gives as many frames at this stride as it has, then repeats its last frame.
    """
    if available < 1:
        raise VideoError("it has no frames")
    span = (num_frames - 1) * stride + 1
    start = int(torch.randint(max(available - span, 0) + 1, (), generator=generator))
    return [min(start + step * stride, available - 1) for step in range(num_frames)]


def count_frames(path: str | os.PathLike[str]) -> int:
    """Frames of a video, from its header where that says, else by reading its packets."""
    with _open(path) as container:
        stream = _video_stream(container)
        if stream.frames:
            return int(stream.frames)
        try:
            return sum(1 for packet in container.demux(stream) if packet.pts is not None)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"its packets cannot be read ({error})") from error


def read_frames(path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
    """The frames at `indices` (ascending; repeats allowed) as [T, C, H, W] uint8 RGB.

    It seeks to the key frame before the first one and decodes from there.

    Raises:
        VideoError: the file cannot be opened or decoded, or ends before the frames wanted.
    """
    wanted = set(indices)
    found: dict[int, Tensor] = {}
    last = -1
    with _open(path) as container:
        stream = _video_stream(container)
        rate, base = stream.average_rate, stream.time_base
        if rate is None or base is None:
            raise VideoError("its stream states no frame rate")
        first_pts = stream.start_time or 0
        try:
            if indices[0] > 0:
                container.seek(first_pts + int(indices[0] / rate / base), stream=stream)
            for frame in container.decode(stream):
                # Time tells which frame this is; a stream without time stamps is counted instead.
                last = last + 1 if frame.pts is None else round((frame.pts - first_pts) * base * rate)
                if last in wanted and last not in found:
                    found[last] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if last >= indices[-1]:
                    break
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"it cannot be decoded ({error})") from error
    return torch.stack([_nearest(found, index, last) for index in indices]).permute(0, 3, 1, 2)


def _nearest(found: dict[int, Tensor], index: int, last: int) -> Tensor:
    """The frame at an index or, where a variable frame rate skips it or the end is short, the nearest one read."""
    if index in found:
        return found[index]
    if not found or index > last + _MISSING_AT_END:
        raise VideoError(f"it ends at frame {last} although frame {index} was wanted, so it is broken or truncated")
    return found[min(found, key=lambda have: abs(have - index))]


def _open(path: str | os.PathLike[str]) -> av.container.InputContainer:
    if not os.path.isfile(path):
        raise VideoError("there is no such file")
    try:
        return av.open(os.fspath(path))
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"it cannot be opened as a video ({error})") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError("it has no video stream")
    return container.streams.video[0]
