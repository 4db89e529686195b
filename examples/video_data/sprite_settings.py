"""The numbers behind the generated clips of `sprites.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

SHAPES = ("disc", "square", "triangle", "cross", "ring")
DIRECTIONS = 4  # right, down, left, up
NUM_CLASSES = len(SHAPES) * DIRECTIONS


@dataclass(frozen=True)
class SpriteSettings:
    """Which clips are generated.

    Attributes:
        length: number of clips.
        num_frames: frames of a clip.
        img_size: height and width in pixels.
        patch_size: side of a patch, for the tokens that move.
        tubelet_size: frames of a patch, for the tokens that move.
        seed: clips of different seeds are independent. Use different seeds for training and testing.
        version: the clips had no still sprite before 2; cached features and checkpoints know data by this.

    Raises:
        ValueError: patches do not divide the clips.
    """

    length: int = 10_000
    num_frames: int = 16
    img_size: int = 64
    patch_size: int = 8
    tubelet_size: int = 2
    seed: int = 0
    version: int = field(default=2, init=False)

    def __post_init__(self) -> None:
        if self.num_frames % self.tubelet_size or self.img_size % self.patch_size:
            raise ValueError(
                f"{self.num_frames} frames of {self.img_size} pixels do not divide into tubelets of "
                f"{self.tubelet_size} frames and patches of {self.patch_size} pixels."
            )
