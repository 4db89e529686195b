"""Reading frames from video files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import torch
from torch import Tensor

from video_data.video_files import VideoError

# Headers often count a frame or two more than decoding gives. A file that lacks more frames is broken.
_MISSING_AT_END = 2
_SHORTEST = 0.9  # least share of the stated duration; a longer sound track may set that
_EARLIER = 32  # frames to seek back when a seek lands behind the wanted frame


class Video:
    """A video, open for reading; a context manager.

    Args:
        source: path or bytes of the video.

    Raises:
        VideoError: the file is missing or not a video.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise VideoError("there is no such file")
        try:
            self._container = av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"it cannot be opened as a video ({error})") from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError("it has no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise VideoError("there is no decoder for its video stream")

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._stream.height, self._stream.width

    @property
    def rate(self) -> Fraction:
        """Frames per second; 25 if the stream does not say."""
        return Fraction(self._stream.average_rate or 25)

    def count(self) -> int:
        """Number of frames, from the header, or by reading packets if the header does not say."""
        if self._stream.frames:
            return int(self._stream.frames)
        try:
            packets = sum(1 for packet in self._container.demux(self._stream) if packet.size)
            self._container.seek(0)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"its packets cannot be read ({error})") from error
        return packets

    def read(self, indices: Sequence[int]) -> Tensor:
        """The frames at `indices` (ascending; repeats allowed) as [T, C, H, W] uint8 RGB.

        If a variable frame rate skips an index, the frame shown at that time is taken.

        Raises:
            VideoError: the file cannot be decoded, or ends before the last wanted frame.
        """
        wanted = sorted(set(indices))
        # A seek may land too late if frames are stored out of order. Then an earlier start is tried.
        starts = (wanted[0], max(wanted[0] - _EARLIER, 0), 0)
        try:
            origin = self._origin()
            for start in starts if origin is not None else (0,):
                found = self._collect(wanted, self._frames(start, origin))
                if found is not None:
                    break
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"it cannot be decoded ({error})") from error
        if found is None:
            raise VideoError("its time stamps do not start at its first frame")
        if len({frame.shape for frame in found.values()}) > 1:
            raise VideoError("its frames change their size")
        return torch.stack([found[index] for index in indices]).permute(0, 3, 1, 2)

    def read_all(self) -> int:
        """Decodes every frame and returns the number of frames; a broken file raises.

        Raises:
            VideoError: as `decode_all`.
        """
        return sum(1 for _ in self.decode_all())

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """Every frame, in order.

        Raises:
            VideoError: a frame cannot be decoded, there are no frames, or the file ends earlier than its header says.
        """
        stated, found = int(self._stream.frames), 0
        try:
            self._container.seek(0)
            for frame in self._container.decode(self._stream):
                yield frame
                found += 1
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"its frame {found} cannot be decoded ({error})") from error
        if not found:
            raise VideoError("it has no frames")
        if found + _MISSING_AT_END < stated:
            raise VideoError(f"it ends after {found} of {stated} frames; it is broken or truncated")
        if not stated and self._container.duration and self._stream.average_rate:  # Matroska states only the duration
            seconds, long = found / self._stream.average_rate, self._container.duration / av.time_base
            if seconds < _SHORTEST * long:
                raise VideoError(f"it ends after {float(seconds):.1f} of {long:.1f} seconds; it is broken or truncated")

    def _origin(self) -> int | None:
        """Time stamp of the first frame, by decoding, since headers may be wrong; None if frames have none (AVI)."""
        self._container.seek(0)
        for packet in self._container.demux(self._stream):
            if packet.size and (packet.pts is None or self._container.format.name == "avi"):
                return None
            for frame in packet.decode():
                return frame.pts
        raise VideoError("no frame of it can be decoded")

    def _frames(self, start: int, origin: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their index, from the key frame before `start` on. Without time stamps, counts from the first."""
        self._container.seek(0)
        if origin is None:
            yield from enumerate(self._container.decode(self._stream))
            return
        rate, base = self._stream.average_rate, self._stream.time_base
        if rate is None or base is None:
            raise VideoError("its stream states no frame rate")
        frames_per_pts = float(base * rate)
        if start:
            self._container.seek(origin + int(start / frames_per_pts), stream=self._stream)
        for frame in self._container.decode(self._stream):
            if frame.pts is None:
                raise VideoError("some of its frames have no time stamps")
            yield round((frame.pts - origin) * frames_per_pts), frame

    @staticmethod
    def _collect(wanted: list[int], frames: Iterator[tuple[int, av.VideoFrame]]) -> dict[int, Tensor] | None:
        """The pixels of the wanted frames; None if `frames` begin after the first wanted frame."""
        found: dict[int, Tensor] = {}
        shown, at = None, -1  # the frame on screen, and its index
        for index, frame in frames:
            if shown is None and index > wanted[0]:
                return None
            while wanted[len(found)] < index:  # the stream skips this index
                found[wanted[len(found)]] = _pixels(shown)
                if len(found) == len(wanted):
                    return found
            shown, at = frame, index
            if wanted[len(found)] == index:
                found[index] = _pixels(frame)
                if len(found) == len(wanted):
                    return found
        if shown is None or wanted[-1] > at + _MISSING_AT_END:
            raise VideoError(f"it ends at frame {at}, before the wanted frame {wanted[-1]}; it is broken or truncated")
        return found | dict.fromkeys(wanted[len(found) :], _pixels(shown))


def _pixels(frame: av.VideoFrame) -> Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24"))  # [H, W, C]
