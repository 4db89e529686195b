"""The settings of every script that runs an encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

FrameSampling = Literal["dense", "segments"]
SIZES = ("img_size", "num_frames", "patch_size", "tubelet_size", "embed_dim", "depth", "num_heads")
DECODER_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")


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
    """Reader processes for each device; 0 reads in the main process."""
    seed: int = 0
    """Seed of every random choice: weights, order of the data, augmentation, masks."""

    def __post_init__(self) -> None:
        self.check_least(num_frames=1, patch_size=1, tubelet_size=1, stride=1, workers=0)

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
