"""WebDataset shards: tar files of videos, and an index with the place of each video in them.

A video is one range of bytes. It is read from a disk, or through fsspec from a URL (https, s3, gs, ...). So videos in
shards can be read in any order, as files can: shuffling, distribution over processes and resuming work alike. Nothing
is extracted or unpickled. An index or shard with a name that leads out of its folder is refused.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from common.atomic_files import replacing
from video_data.video_files import VIDEO_SUFFIXES, Unreachable, VideoError

INDEX = "index.json"
_FORMAT = "adamae_sampler shards 1"


@dataclass(frozen=True)
class Span:
    """A range of bytes of a shard: path or URL of the shard, first byte, number of bytes."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            VideoError: the shard is missing or truncated.
            Unreachable: the disk or server of the shard cannot be reached.
        """
        try:
            if _is_url(self.shard):
                system, path = fsspec.core.url_to_fs(self.shard)
                data: bytes = system.cat_file(path, start=self.offset, end=self.offset + self.size)
            else:
                with open(self.shard, "rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except FileNotFoundError as error:
            raise VideoError(f"{self.shard}: there is no such shard") from error
        except Exception as error:  # the file systems of fsspec raise errors of their own
            raise Unreachable(f"{self.shard} cannot be read ({type(error).__name__}: {error})") from error
        if len(data) != self.size:
            raise VideoError(f"{self.shard} ends {self.size - len(data)} bytes early; it is truncated")
        return data


@dataclass(frozen=True)
class ShardVideo:
    """A video of a shard: name in the shard, label, and range of bytes."""

    name: str
    label: int
    span: Span


def is_index(data: str) -> bool:
    """Whether the name of a data set means shards: an index.json, or a folder that has one."""
    return data.endswith(f"/{INDEX}") or data == INDEX or (not _is_url(data) and os.path.isfile(f"{data}/{INDEX}"))


def read_index(data: str) -> list[ShardVideo]:
    """The videos of an index.json (path or URL) or of a folder that has one.

    Raises:
        FileNotFoundError: the index or one of its shards is missing.
        ValueError: the file is not an index, or it names a place outside of its folder or of a shard.
    """
    place = data if data.endswith(INDEX) else f"{data}/{INDEX}"
    with fsspec.open(place, "rb") as file:
        try:
            index: dict[str, Any] = json.loads(file.read())
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}.") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{place} is not an index of shards; make one with 'prepare_data.py index'.")
    folder = place[: -len(INDEX)]
    videos = []
    for shard in index["shards"]:
        path = f"{folder}{_inside(shard['name'], place)}"
        if not _is_url(path):
            _check_size(path, shard["bytes"])
        for name, offset, size, label in shard["videos"]:
            if not (offset >= 0 and size >= 0 and offset + size <= shard["bytes"]):
                raise ValueError(f"{place}: {name} (offset {offset}, {size} bytes) is not within {shard['name']}.")
            videos.append(ShardVideo(f"{path}/{_inside(name, place)}", int(label), Span(path, offset, size)))
    return videos


def index_shard(path: Path) -> dict[str, Any]:
    """The index entry of a shard: its name and size, and the name, offset, size and label of each video.

    Members with the same name up to the first dot are one sample, as in WebDataset. The label is in a .cls member,
    or is "label" in a .json member; without either it is -1.

    Raises:
        ValueError: the file is not an uncompressed tar file, or has a link, a device, an absolute name or "..".
    """
    videos: dict[str, list[Any]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if PurePosixPath(member.name).name.startswith("."):  # files that file managers leave
                    continue
                name = _inside(member.name, str(path))
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path}: {name} is a link, a device or a sparse file; expected plain files.")
                key, _, suffix = PurePosixPath(name).name.partition(".")
                key = str(PurePosixPath(name).with_name(key))
                if f".{suffix.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES:
                    if key in videos:
                        raise ValueError(
                            f"{path}: {videos[key][0]} and {name} are both videos of sample {key}; rename one."
                        )
                    videos[key] = [name, member.offset_data, member.size]
                elif suffix in ("cls", "json"):
                    stored = tar.extractfile(member)
                    labels[key] = _label(stored.read() if stored else b"", suffix, f"{path}: {name}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar file, or is truncated ({error}).") from error
    entries = [[*place, labels.get(key, -1)] for key, place in videos.items()]
    return {"name": path.name, "bytes": path.stat().st_size, "videos": entries}


def write_index(folder: Path, shards: list[dict[str, Any]]) -> Path:
    """Writes index.json for the shards in a folder; `shards` are entries of `index_shard`."""
    with replacing(folder / INDEX) as aside:
        aside.write_text(json.dumps({"format": _FORMAT, "shards": shards}, ensure_ascii=False), encoding="utf-8")
    return folder / INDEX


def _inside(name: str, where: str) -> str:
    """The name. Raises ValueError if the name is absolute or leads out of its folder."""
    path = PurePosixPath(name)
    # Libraries for URLs may decode %2e, and end a path at ? and #.
    if path.is_absolute() or ".." in path.parts or any(each in name for each in "\\:%?#") or not path.parts:
        raise ValueError(f"{where}: the name {name!r} leads out of the folder.")
    return name


def _label(stored: bytes, suffix: str, where: str) -> int:
    try:
        return int(json.loads(stored).get("label", -1) if suffix == "json" else stored)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: expected a number, the label ({error}).") from error


def _check_size(path: str, size: int) -> None:
    found = os.path.getsize(path) if os.path.isfile(path) else None
    if found is None:
        raise FileNotFoundError(f"{path}: this shard of the index is missing.")
    if found != size:
        raise ValueError(f"{path} has {found} bytes, expected {size} by the index; it is truncated or another file.")


def _is_url(path: str) -> bool:
    return "://" in path
