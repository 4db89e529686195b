"""Broken videos of a run: quarantine.txt names them, and a run ends if their share is too large."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from common.atomic_files import append_whole
from video_data.clips import ClipSource


class BrokenVideos:
    """The broken videos that any process of a run has found. A file has a line `name<tab>why` for each.

    Args:
        path: the file. Only the main process reads it (at the start) and writes it.
        source: the data set. Lines of the file that name other videos are ignored.
        largest_share: share of the videos that may be broken.
        writes: whether this is the main process.
    """

    def __init__(self, path: Path, source: ClipSource, largest_share: float, writes: bool) -> None:
        self.path = path
        self.videos = len(source)
        self.largest_share = largest_share
        self.writes = writes
        names = {source.name(index) for index in range(self.videos)}
        entries = {name: why for name, why in read_broken_videos(path).items() if name in names} if writes else {}
        self.known: dict[str, str] = broadcast_object_list([entries])[0]
        self._found: dict[str, str] = {}  # by this process, not yet exchanged
        self._unwritten = "" if not writes or _ends_with_a_line(path) else "\n"

    def add(self, found: Mapping[str, str]) -> None:
        """Keeps the broken videos that this process found, {name: reason}, for the next `exchange`."""
        self._found |= found

    def exchange(self) -> str | None:
        """Shares the new broken videos among all processes; all processes call this.

        Returns:
            An error message if more than the tolerated share is broken, else None.
        """
        everywhere = dict(gather_object(list(self._found.items())))
        self._found.clear()
        new = {name: why for name, why in everywhere.items() if name not in self.known}
        self.known |= new
        if new and self.writes:
            self._unwritten += "".join(f"{name}\t{' '.join(why.split())}\n" for name, why in new.items())
            try:
                append_whole(self.path, self._unwritten)
                self._unwritten = ""
            except OSError as error:
                tqdm.write(f"{self.path} could not be written ({error}); the next broken video tries again")
            for name, why in new.items():
                tqdm.write(f"broken video, replaced by another: {name}: {why}")
        if len(self.known) <= self.largest_share * self.videos:
            return None
        first = "\n  ".join(f"{name}: {why}" for name, why in list(self.known.items())[:8])
        return (
            f"{len(self.known)} of {self.videos} videos cannot be used, more than max_broken="
            f"{self.largest_share:g} of them; the first:\n  {first}\n{self.path} lists all. Mend the videos and "
            "delete their lines, or raise --max-broken."
        )

    def report(self) -> None:
        """Prints the number of broken videos at the end of a run."""
        if self.known:
            print(f"{len(self.known)} videos could not be used and were replaced by others; {self.path} lists them")


def read_broken_videos(path: Path) -> dict[str, str]:
    """The reason for each video name in the file; nothing if there is no file. A half-written last line is skipped."""
    if not path.is_file():
        return {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    entries = (line.partition("\t") for line in whole.split("\n"))
    return {name: why for name, tab, why in entries if tab}


def _ends_with_a_line(path: Path) -> bool:
    return not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
