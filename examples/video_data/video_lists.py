"""List files: the videos of a data set and their labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from video_data.shards import Span, is_index, read_index
from video_data.video_files import VIDEO_SUFFIXES, VideoError

if TYPE_CHECKING:
    from torch import Tensor

    from video_data.video import Video

LABELS = "labels.txt"  # the names of the classes, one a line, beside the lists


@dataclass(frozen=True)
class VideoEntry:
    """One video of a list.

    Attributes:
        path: path of the file; for a video in a shard only a name.
        label: class of the video; -1 for none.
        start: first frame of the part that is used.
        frames: number of frames of that part; None is all frames from `start` on.
        where: name of the video in messages.
        span: bytes of the video in a shard; None for a file.
    """

    path: Path
    label: int = -1
    start: int = 0
    frames: int | None = None
    where: str = ""
    span: Span | None = None

    @property
    def name(self) -> str:
        """The path, and the part if the list gives one."""
        part = "" if not self.start and self.frames is None else f" from {self.start}, {self.frames or 'all'} frames"
        return f"{self.path}{part}"

    def open(self) -> Video:
        """The video, open for reading; raises VideoError."""
        from video_data.video import Video  # it needs torch, and lists do not

        return Video(self.path if self.span is None else self.span.read())

    def count_frames(self, video: Video) -> int:
        """The number of frames of the part that is used; `video` is the opened entry. Raises VideoError."""
        available = video.count() - self.start
        return available if self.frames is None else min(available, self.frames)

    def read_clips(self, choose: Callable[[int], Sequence[list[int]]]) -> tuple[Tensor, list[list[int]]]:
        """The frames of several clips, each decoded once.

        Args:
            choose: number of frames of the part that is used -> the frames of each clip, in ascending order.

        Returns:
            The distinct frames [F, C, H, W] uint8, and for each clip the positions of its frames among them.

        Raises:
            VideoError: the video cannot be read; the message names it.
        """
        try:
            with self.open() as video:
                clips = choose(self.count_frames(video))
                wanted = sorted({place for clip in clips for place in clip})
                frames = video.read([self.start + place for place in wanted])  # [distinct, C, H, W]
        except VideoError as error:
            raise type(error)(f"{self.where}: {error}") from error
        at = {place: number for number, place in enumerate(wanted)}
        return frames, [[at[place] for place in clip] for clip in clips]

    def read(self) -> bytes:
        """The bytes of the video file; raises VideoError."""
        if self.span is not None:
            return self.span.read()
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise VideoError(f"it cannot be read ({error})") from error

    def fingerprint(self) -> str:
        """Identifies the video and the state of its file: path, part, label, size and time."""
        stat = self.path.stat() if self.span is None and self.path.exists() else None
        file = self.span or (stat and (stat.st_size, stat.st_mtime_ns))
        return repr(((str(self.path), self.label, self.start, self.frames), file))


def list_videos(data: str | Path) -> list[VideoEntry]:
    """The videos of a folder (with subfolders, sorted), of a list file, or of shards (a folder with an index.json, or
    the path or URL of an index.json).

    A line of a list is `path label` or `path start frames label`, as in VideoMAE. `frames` below 1 means all frames
    from `start` on. Relative paths start at the list's folder. Empty lines and lines that begin with # are skipped.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a line has another form (the message has its number), the index is not valid, or there is no video.
    """
    if is_index(str(data)):
        shards = read_index(str(data))
        entries = [VideoEntry(Path(each.name), each.label, where=each.name, span=each.span) for each in shards]
        if not entries:
            raise ValueError(f"{data} lists no videos.")
        return entries
    data = Path(data)
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        entries = [VideoEntry(path, where=str(path)) for path in found]
    elif data.is_file():
        lines = enumerate(data.read_text(encoding="utf-8").splitlines(), start=1)
        entries = [
            _parse_line(data, n, line) for n, line in lines if line.strip() and not line.lstrip().startswith("#")
        ]
    else:
        raise FileNotFoundError(f"{data}: no such folder or list file. Use 'sprites' for generated clips.")
    if not entries:
        raise ValueError(f"{data} has no videos; expected {', '.join(VIDEO_SUFFIXES)} files, or lines of a list.")
    return entries


def _parse_line(data: Path, number: int, line: str) -> VideoEntry:
    # Numbers are matched from the right, since paths may have spaces.
    long = re.fullmatch(r"\s*(\S.*?)\s+(\d+)\s+(-?\d+)\s+(-?\d+)\s*", line)
    short = re.fullmatch(r"\s*(\S.*?)\s+(-?\d+)\s*", line)
    if long:
        path, (start, frames, label) = long[1], map(int, long.groups()[1:])
    elif short and not re.search(r"\s-?\d+$", short[1]):  # two numbers: a number is missing
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


def write_list(path: Path, entries: Iterable[VideoEntry]) -> None:
    """Writes a list. Paths within the folder of the list are written as relative paths.

    Raises:
        ValueError: a path cannot stand in a line (line break, outer space, # at the start), or a video is in a shard.
    """
    folder = path.parent.resolve()
    lines = []
    for entry in entries:
        if entry.span is not None:
            raise ValueError(f"{entry.path} is in a shard; a list can only name files.")
        video = entry.path.resolve()
        name = str(video.relative_to(folder) if video.is_relative_to(folder) else video)
        if name != name.strip() or name.startswith("#") or len(name.splitlines()) != 1:
            raise ValueError(
                f"{name!r} cannot stand in a list (line break, outer space or # at the start); rename the file."
            )
        # The long form also keeps a number at the end of a name from being read as a label.
        long = entry.start or entry.frames is not None or re.search(r"\s-?\d+$", name)
        middle = f" {entry.start} {-1 if entry.frames is None else entry.frames}" if long else ""
        lines.append(f"{name}{middle} {entry.label}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def class_names(data: Path, num_classes: int) -> list[str]:
    """The class names in labels.txt, beside a list or in a folder of shards; numbers if there is no such file.

    Raises:
        ValueError: the file has fewer names than there are classes.
    """
    path = (data if data.is_dir() else data.parent) / LABELS
    if not path.is_file():
        return [str(label) for label in range(num_classes)]
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) < num_classes:
        raise ValueError(f"{path} names {len(names)} classes, expected {num_classes}.")
    return names[:num_classes]


def split_by_label(entries: Sequence[VideoEntry], num_classes: int) -> tuple[list[VideoEntry], list[str]]:
    """The entries with labels in 0 .. num_classes - 1, and a message for each of the others."""
    good = [entry for entry in entries if 0 <= entry.label < num_classes]
    bad = [
        f"{entry.where}: label {entry.label} is not in 0..{num_classes - 1}"
        for entry in entries
        if not 0 <= entry.label < num_classes
    ]
    return good, bad
