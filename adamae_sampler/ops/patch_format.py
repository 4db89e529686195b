"""PatchFormat: how a video is cut into patches, and how its pixels are normalised. All ops on pixels take one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PatchSize = int | tuple[int, int]


class PatchFormat(NamedTuple):
    """How a video is cut and normalised. `PatchFormat.of` checks a public function's arguments and builds the format.

    It is a named tuple, because `torch.compile` traces it as it traces plain tuples.

    Attributes:
        patch: (frames, height, width) of a patch, in pixels.
        normalize: whether the target is normalised per patch and channel.
        mean: the channel means, as a share of 255, by which pixels are normalised; None if they are not.
        std: the standard deviations that go with `mean`.
    """

    patch: tuple[int, int, int]
    normalize: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @classmethod
    def of(
        cls,
        patch_size: PatchSize,
        tubelet_size: int,
        normalize: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PatchFormat:
        """Builds the format, and checks all arguments that do not depend on the video.

        Args:
            patch_size: height and width of a patch in pixels, one number or a pair.
            tubelet_size: frames of a patch.
            normalize: see `PatchFormat`.
            mean: see `PatchFormat`.
            std: see `PatchFormat`.

        Raises:
            TypeError: `mean` or `std` is neither a list nor a tuple.
            ValueError: a size is not a positive whole number; one pixel is to be normalised; `mean` and `std` do not
                fit each other; or a standard deviation is not positive.
        """
        if isinstance(patch_size, int):
            patch = (tubelet_size, patch_size, patch_size)
        elif isinstance(patch_size, Sequence) and len(patch_size) == 2:
            patch = (tubelet_size, patch_size[0], patch_size[1])
        else:
            raise ValueError(f"patch_size={patch_size}, expected a whole number, or a pair: height, width.")
        for each in patch:
            if not isinstance(each, int) or each < 1:
                raise ValueError(
                    f"tubelet_size={tubelet_size} and patch_size={patch_size}, expected positive whole numbers."
                )
        if normalize and math.prod(patch) < 2:
            raise ValueError("a patch of one pixel has no standard deviation; use normalize=False.")
        if mean is not None or std is not None:
            _check_statistics(mean, std)
        return cls(patch, normalize, mean, std)

    @property
    def pixels(self) -> int:
        """The number of pixels of a patch. Each pixel has C values."""
        return math.prod(self.patch)

    def grid(self, video_shape: Sequence[int]) -> tuple[int, int, int]:
        """The (T, H, W) token grid of a [B, C, T, H, W] video.

        Raises:
            ValueError: the shape has another number of axes, or patches do not divide the frames or the sides.
        """
        if len(video_shape) != 5:
            raise ValueError(
                f"video has shape {tuple(video_shape)}, expected [B, C, T, H, W]: clips, channels, frames, height, "
                "width. For images use images.unsqueeze(2) and tubelet_size=1."
            )
        _, _, frames, height, width = video_shape
        tubelet, p1, p2 = self.patch
        if frames % tubelet:
            raise ValueError(
                f"video has {frames} frames, which tubelet_size={tubelet} does not divide. Use "
                f"{frames - frames % tubelet or tubelet} frames or another tubelet size, 1 for images."
            )
        if height % p1 or width % p2:
            raise ValueError(
                f"video frames are {height}x{width}, which patches of {p1}x{p2} do not divide. Resize or crop the "
                "frames, or choose another patch size."
            )
        return frames // tubelet, height // p1, width // p2


def _check_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raises unless mean and std fit each other."""
    if mean is None or std is None:
        raise ValueError(f"mean={mean} and std={std}, expected both or neither.")
    if not isinstance(mean, Sequence) or not isinstance(std, Sequence):
        raise TypeError(f"mean={mean} and std={std}, expected lists or tuples with a number for each channel.")
    if len(mean) != len(std):
        raise ValueError(f"mean has {len(mean)} values, std {len(std)}; expected one of each for every channel.")
    for each in std:
        if not each > 0:
            raise ValueError(f"std={std}, expected positive numbers.")
