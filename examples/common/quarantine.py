"""Videos that cannot be used: a file that names them, and a bound on how many there may be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from accelerate.utils import gather_object
from tqdm import tqdm

from common.video import VideoError


class Quarantine:
    """The broken videos of a run: `name<tab>why` in a file, a line each, added as they are found by any process.

    A resumed run reads the file and does not open them again; take a line out to have a video tried once more.

    Args:
        path: the file.
        videos: how many the data set has.
        largest_share: of them may be broken.
        writes: whether this process writes the file.
    """

    def __init__(self, path: Path, videos: int, largest_share: float, writes: bool) -> None:
        self.path = path
        self.videos = videos
        self.largest_share = largest_share
        self.writes = writes
        self.known = read_quarantine(path)

    def add(self, found: Mapping[str, str]) -> None:
        """Adds what this process found (name: why); all processes have to call it, and each learns what others found.

        Raises:
            VideoError: more than the share is broken.
        """
        everywhere = dict(gather_object(list(found.items())))
        new = {name: why for name, why in everywhere.items() if name not in self.known}
        self.known |= new
        if new and self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\t{_on_one_line(why)}\n" for name, why in new.items())
                file.flush()
                os.fsync(file.fileno())
            for name, why in new.items():
                tqdm.write(f"cannot be used, others take its place: {name}: {why}")
        if len(self.known) > self.largest_share * self.videos:
            first = "\n  ".join(f"{name}: {why}" for name, why in list(self.known.items())[:8])
            raise VideoError(
                f"{len(self.known)} of {self.videos} videos cannot be used, more than max_broken="
                f"{self.largest_share:g} of them; the first:\n  {first}\nAll are in {self.path}. Mend the data, or "
                "allow more with --max-broken."
            )

    def report(self) -> None:
        """Says at the end of a run how many there are."""
        if self.known:
            print(f"{len(self.known)} videos could not be used and others took their place; they are in {self.path}")


def read_quarantine(path: Path) -> dict[str, str]:
    """Name and cause of each video in the file, if there is one; a half-written last line is no entry."""
    if not path.is_file():
        return {}
    entries = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: why for name, tab, why in entries if tab}


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
