"""Data sets by name: from --data, --train or --val to videos and labels. `sources.py` makes clips of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.settings import EncoderSettings
from video_data.sprite_settings import DIRECTIONS, NUM_CLASSES, SHAPES, SpriteSettings
from video_data.video_lists import VideoEntry, class_names, list_videos, split_by_label


def find_sprites(data: str, settings: EncoderSettings) -> SpriteSettings | None:
    """The sprites for the name 'sprites', 'sprites:LENGTH' or 'sprites:LENGTH:SEED', or None for another name.

    Give training and evaluation different seeds, so that their clips differ. The default seed is the seed of the run.

    Raises:
        ValueError: a malformed name, or clips that are not square.
    """
    name, *numbers = data.split(":")
    if name != "sprites":
        return None
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{data!r}, expected 'sprites', 'sprites:LENGTH' or 'sprites:LENGTH:SEED'.")
    height, width = settings.img_size
    if height != width:
        raise ValueError(f"img_size is {settings.img_size}, but sprites are square; use --img-size 64 64, for example.")
    length = int(numbers[0]) if numbers else 10_000
    seed = int(numbers[1]) if len(numbers) == 2 else settings.seed
    return SpriteSettings(length, settings.num_frames, height, settings.patch_size, settings.tubelet_size, seed)


@dataclass
class VideoDataset:
    """A data set: sprites, or the videos of a folder, a list or shards.

    Attributes:
        name: name of the data set on the command line.
        sprites: the generated clips; None for videos.
        entries: the videos; empty for sprites.
    """

    name: str
    sprites: SpriteSettings | None
    entries: list[VideoEntry]

    @classmethod
    def find(cls, name: str, settings: EncoderSettings) -> VideoDataset:
        """The data set with this name; an empty one for an empty name. Raises ValueError or FileNotFoundError."""
        sprites = find_sprites(name, settings)
        return cls(name, sprites, list_videos(name) if name and sprites is None else [])

    def __len__(self) -> int:
        return len(self.entries) if self.sprites is None else self.sprites.length

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return NUM_CLASSES if self.sprites is not None else max((e.label for e in self.entries), default=-1) + 1

    def labels(self) -> set[int]:
        """The labels that occur."""
        return set(range(NUM_CLASSES)) if self.sprites is not None else {entry.label for entry in self.entries}

    def drop_labels(self, num_classes: int) -> list[str]:
        """Leaves out the videos whose label is not in 0 .. num_classes - 1, and returns a message for each.

        Raises:
            ValueError: no video would be left, or sprites have more classes than `num_classes`.
        """
        if self.sprites is not None:
            if num_classes < NUM_CLASSES:
                raise ValueError(f"sprites have {NUM_CLASSES} classes, but num_classes is {num_classes}.")
            return []
        good, messages = split_by_label(self.entries, num_classes)
        if self.entries and all(entry.label == -1 for entry in self.entries):
            raise ValueError(
                f"{self.name} gives no labels. Give a list with a line 'path label' for each video, such as "
                "'running/clip01.mp4 0'; labels count from 0."
            )
        if self.entries and not good:
            raise ValueError(f"{self.name}: no label is in 0..{num_classes - 1}; the first: {messages[0]}.")
        self.entries = good
        return messages

    def class_names(self, num_classes: int) -> list[str]:
        """Names of the classes, for reports."""
        if self.sprites is not None:
            directions = ("right", "down", "left", "up")
            names = [f"{shape} {direction}" for shape in SHAPES for direction in directions[:DIRECTIONS]]
            return names + [str(label) for label in range(len(names), num_classes)]
        return class_names(Path(self.name), num_classes)

    def describe(self, index: int) -> str:
        """The path of a video, for reports."""
        return str(self.entries[index].path) if self.sprites is None else f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        """A hash of the paths, parts, labels, sizes and times of the files."""
        if self.sprites is not None:
            return repr(sorted(vars(self.sprites).items()))
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(entry.fingerprint().encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class LabelledData:
    """A training and an evaluation data set with the same classes.

    Attributes:
        train: the videos to train on.
        val: the videos to evaluate on.
        names: names of the classes.
        train_left_out: messages about the videos that `train` leaves out, since their labels are out of range.
        val_left_out: the same for `val`.
    """

    train: VideoDataset
    val: VideoDataset
    names: list[str]
    train_left_out: list[str]
    val_left_out: list[str]

    @classmethod
    def find(cls, train: str, val: str, settings: EncoderSettings, num_classes: int | None = None) -> LabelledData:
        """The data sets with these names. If `num_classes` is None, it is one more than the largest label, at least 2.

        Raises:
            FileNotFoundError: there is no such data set.
            ValueError: a malformed list, labels that are all out of range, or the same sprites in both.
        """
        found, other = VideoDataset.find(train, settings), VideoDataset.find(val, settings)
        if found.sprites is not None and other.sprites is not None and found.sprites.seed == other.sprites.seed:
            raise ValueError(f"--train {train} and --val {val} have the same clips; change the seed of one.")
        classes = num_classes or max(found.num_classes, other.num_classes, 2)
        left_out, other_left_out = found.drop_labels(classes), other.drop_labels(classes)
        return cls(found, other, other.class_names(classes), left_out, other_left_out)

    def describe_classes(self) -> str:
        """How many classes each data set has, and which classes only val has, on one line."""
        known, unknown = self.train.labels(), sorted(self.val.labels() - self.train.labels())
        if not known and not self.val.labels():
            return "not known without data"
        parts = ((known, "to train on"), (self.val.labels(), "to test on"))
        seen = [f"{len(labels)} of them {what}" for labels, what in parts if labels]
        text = f"{len(self.names)}: {', '.join(seen)}"
        if self.train.entries and self.train.fingerprint() == self.val.fingerprint():
            text += "; WARNING: --train and --val are the same videos, so the accuracy says nothing about new ones"
        if not unknown or not known:
            return text
        first = next((entry.where for entry in self.val.entries if entry.label == unknown[0]), self.val.name)
        return f"{text}; WARNING: {len(unknown)} classes of val have no training videos, such as {unknown[0]} ({first})"
