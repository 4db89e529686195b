"""The settings of every script that runs an encoder."""

from __future__ import annotations

import inspect
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

FrameSampling = Literal["dense", "segments"]
SIZES = ("img_size", "num_frames", "patch_size", "tubelet_size", "embed_dim", "depth", "num_heads")
DECODER_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_NEEDED = ("checkpoint", "data", "train", "val", "video", "output")
_AT_THE_END = ("model", *SIZES, *DECODER_SIZES)
Kind = TypeVar("Kind")


def listed(kind: type[Kind]) -> type[Kind]:
    """A decorator of settings: --help and recipe.yaml begin with what a run needs, then come the settings of the class,
    then those of its bases, and at the end the model and its sizes."""
    fields: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]

    def place(name: str) -> tuple[int, int]:
        for group, names in ((0, _NEEDED), (2, _AT_THE_END)):
            if name in names:
                return group, names.index(name)
        return 1, next(n for n, each in enumerate(kind.__mro__) if name in inspect.get_annotations(each))

    kind.__dataclass_fields__ = {name: fields[name] for name in sorted(fields, key=place)}  # type: ignore[attr-defined]
    return kind


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Sizes of the encoder and of clips, and the frames of a video that a clip takes."""

    model: str
    """Name of the model in timm's registry."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width of a clip in pixels."""
    num_frames: int = 16
    """Number of frames of a clip."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    tubelet_size: int = 2
    """Number of frames of a patch."""
    embed_dim: int | None = None
    """Width of the encoder; None keeps the model's own."""
    depth: int | None = None
    """Number of blocks of the encoder; None keeps the model's own."""
    num_heads: int | None = None
    """Number of attention heads of the encoder; None keeps the model's own."""

    sampling: FrameSampling = "dense"
    """How a clip takes its frames. 'dense': frames at --stride from one start (Kinetics). 'segments': one frame from
    each of num_frames equal parts of the video; --stride has no effect (Something-Something)."""
    stride: int = 4
    """Distance between two frames of a clip, in frames of the video."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of autocast. 'auto': bf16 on GPUs with bf16 units, else fp32. 'fp16' scales the loss on GPUs."""
    workers: int = 4
    """Reader processes for each device, at most its share of the cores; 0 reads in the main process."""
    seed: int = 0
    """Seed of every random choice: weights, order of the data, augmentation, masks."""

    def __post_init__(self) -> None:
        self.check_least(num_frames=1, patch_size=1, tubelet_size=1, stride=1, workers=0)

    @property
    def readers(self) -> int:
        """Reader processes of a device: `workers`, at most its share of this machine's cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    @property
    def grid(self) -> tuple[int, int, int]:
        """The number of tokens of a clip in time, height and width."""
        height, width = self.img_size
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    def check_sizes(self) -> None:
        """Raises ValueError if patches do not divide clips, or heads the encoder's width.

        `parse_settings` and `parse_arguments` call this, since tyro draws a frame around messages of `__post_init__`.
        """
        if any(side % self.patch_size for side in self.img_size):
            raise ValueError(f"patch_size={self.patch_size} does not divide img_size={self.img_size}; change either.")
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"tubelet_size={self.tubelet_size} does not divide num_frames={self.num_frames}; change either."
            )
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; change either.")

    def check_least(self, **least: float) -> None:
        """Raises ValueError for a setting below its least value. A setting of None passes."""
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value}, expected {bound} or more.")

    def check_most(self, **most: float) -> None:
        """Raises ValueError for a setting above its largest value. A setting of None passes."""
        for name, bound in most.items():
            value = getattr(self, name)
            if value is not None and not value <= bound:
                raise ValueError(f"{name}={value}, expected {bound} or less.")

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments of `timm.create_model` for the sizes of clips and encoder; None keeps the model's own."""
        return {name: getattr(self, name) for name in SIZES}

    def plain(self) -> dict[str, Any]:
        """The settings as numbers, strings and lists, for files."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
