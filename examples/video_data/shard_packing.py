"""Packing videos into shards: resized, with a key frame every few frames, without sound."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from common.atomic_files import replacing
from video_data.shards import index_shard, write_index
from video_data.video_files import VideoError
from video_data.video_lists import VideoEntry

if TYPE_CHECKING:
    from video_data.video import Video


@dataclass(frozen=True)
class Packing:
    """The format of the stored videos.

    Attributes:
        short_side: short side in pixels. A larger video is resized; a smaller one stays as it is, byte for byte.
        videos_per_shard: number of videos in a tar file.
        keyframe_every: frames from one key frame to the next; a clip decodes at most so many unused frames.
        crf: quality of H.264; a lower number gives better quality and larger files.
        seed: seed of the order of packing; lists are shuffled, since they are often sorted by class.
    """

    short_side: int = 320
    videos_per_shard: int = 256
    keyframe_every: int = 16
    crf: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("short_side", "videos_per_shard", "keyframe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 1 or more.")


def pack(
    entries: Sequence[VideoEntry], folder: Path, packing: Packing, workers: int
) -> Iterator[tuple[list[str], int, int]]:
    """Writes shards of all videos, then the index. Shards of an interrupted packing are kept.

    Yields:
        for each finished shard: messages about videos that could not be packed, number of videos, size in bytes.

    Raises:
        ValueError: the folder has shards of other videos or other settings.
    """
    names = "\n".join(repr((str(entry.path), entry.label, entry.start, entry.frames)) for entry in entries)
    settings = {**asdict(packing), "videos": len(entries), "list": hashlib.sha256(names.encode()).hexdigest()}
    about = folder / "packing.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{folder} has shards of another list or with other settings (see {about}); name another folder."
        )
    with replacing(about) as aside:
        aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    order = list(range(len(entries)))
    random.Random(packing.seed).shuffle(order)
    shards: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers) as pool:
        for number, start in enumerate(range(0, len(order), packing.videos_per_shard)):
            path = folder / f"shard-{number:06d}.tar"
            reasons = path.with_suffix(".left_out.txt")
            if not path.exists():
                mine = order[start : start + packing.videos_per_shard]
                stored = pool.map(partial(_encode, packing=packing), [entries[index] for index in mine])
                _write(path, reasons, [(index, entries[index]) for index in mine], stored)
            shards.append(index_shard(path))
            left_out = reasons.read_text(encoding="utf-8").splitlines() if reasons.exists() else []
            yield left_out, len(shards[-1]["videos"]), shards[-1]["bytes"]
    write_index(folder, shards)


def _write(
    path: Path, reasons: Path, videos: list[tuple[int, VideoEntry]], stored: Iterator[tuple[str, bytes] | str]
) -> None:
    """Writes a shard, whole or not at all, and the reasons why videos are left out."""
    left_out: list[str] = []
    with replacing(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for (index, entry), found in zip(videos, stored, strict=True):
            if isinstance(found, str):
                left_out.append(" ".join(f"{entry.where}: {found}".split()))
                continue
            suffix, data = found
            about = json.dumps({"label": entry.label, "path": str(entry.path), "start": entry.start}).encode()
            for name, content in ((f"{index:09d}{suffix}", data), (f"{index:09d}.json", about)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        if left_out:
            with replacing(reasons) as text:
                text.write_text("\n".join(left_out) + "\n", encoding="utf-8")


def _encode(entry: VideoEntry, packing: Packing) -> tuple[str, bytes] | str:
    """Suffix and bytes of a video as stored, or the reason why it cannot be used."""
    try:
        with entry.open() as video:
            height, width = video.size
            if min(height, width) > packing.short_side or entry.start or entry.frames is not None:
                return ".mp4", _shrunk(video, entry, packing)
            video.read_all()  # raises for a broken video
        return entry.path.suffix.lower(), entry.read()
    except (VideoError, av.FFmpegError, ValueError, ZeroDivisionError) as error:  # libav's, for odd sizes and rates
        return str(error)


def _shrunk(video: Video, entry: VideoEntry, packing: Packing) -> bytes:
    height, width = video.size
    factor = min(packing.short_side / min(height, width), 1.0)
    height, width = (max(2 * round(side * factor / 2), 2) for side in (height, width))  # H.264 takes even sizes
    options = {"crf": str(packing.crf), "g": str(packing.keyframe_every), "preset": "veryfast"}
    stored, count = io.BytesIO(), 0
    end = None if entry.frames is None else entry.start + entry.frames
    with av.open(stored, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=video.rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in islice(video.decode_all(), entry.start, end):
            small = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
            small.pts = count  # at a constant rate, whatever the source's time stamps
            small.time_base = 1 / video.rate
            container.mux(stream.encode(small))
            count += 1
        container.mux(stream.encode(None))
    if not count:
        raise VideoError("it has no frames in the part that the list names")
    return stored.getvalue()
