"""The interface of all samplers."""

from __future__ import annotations

import abc
import inspect
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample, check_valid, num_visible_tokens, require
from adamae_sampler.ops.checks import check_device, check_tokens
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.draws import repeat_rows, rows_of


class TokenSampler(nn.Module, abc.ABC):
    """Base of all samplers: the grid, the ratio, the checks, and masks that the caller passes.

    A sampler of your own sets `num_visible` and defines `draw(tokens, generator)`. To see the pixels too, it sets
    `uses_video = True`, and both `draw` and `complete` get `video=`. To take other grids than its own, both have
    an argument `grid_size=None`; `num_visible_at` says K there, if it is not floor(N (1 - ratio)). To leave tokens out,
    `draw` has an argument `valid=None`.

    Args:
        grid_size: (T, H, W), tokens in time, height and width; N = T H W tokens in t-h-w order.
        mask_ratio: share of tokens to mask, strictly between 0 and 1.
        num_masks: R, masks of each clip. A sample then has B R rows, clip by clip.
    """

    num_visible: int  # K; set by each sampler, since each rounds to whole units of its own
    uses_video: bool = False  # whether a draw needs the pixels
    takes_grids: bool  # whether it draws for other grids than its own, which the arguments of its methods say
    takes_valid: bool  # whether it can leave tokens out; the arguments of `draw` say so

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "describe" in vars(cls):
            raise TypeError(f"{cls.__name__}.describe is now called complete; rename it.")
        cls.takes_grids = all(
            "grid_size" in inspect.signature(method).parameters for method in (cls.draw, cls.complete)
        )
        cls.takes_valid = "valid" in inspect.signature(cls.draw).parameters

    def __init__(self, grid_size: GridSize, mask_ratio: float, num_masks: int = 1) -> None:
        super().__init__()
        if not isinstance(num_masks, int) or num_masks < 1:
            raise ValueError(f"num_masks={num_masks!r}, expected a whole number of masks for each clip, 1 or more.")
        self.num_masks = num_masks
        self.grid_size = checked_grid(grid_size)
        self.mask_ratio = mask_ratio

    @property
    def num_tokens(self) -> int:
        """N, tokens of a clip."""
        return math.prod(self.grid_size)

    def num_visible_at(self, grid_size: GridSize) -> int:
        """K at a grid: the same mask ratio, rounded as at the sampler's own.

        Raises:
            ValueError: the ratio leaves nothing to show or to hide.
        """
        return num_visible_tokens(math.prod(grid_size), self.mask_ratio)

    def num_drawn(self, grid_size: GridSize | None) -> int:
        """K of a draw: `num_visible` at the sampler's own grid, which is None."""
        return self.num_visible if grid_size is None else self.num_visible_at(grid_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        video: Tensor | None = None,
        mask: Tensor | MaskSample | None = None,
        generator: torch.Generator | None = None,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws a mask for each clip, or takes the given one.

        Args:
            tokens: [B, N, D].
            video: [B, C, T, H, W], uint8 or floating point, the pixels of the tokens. Its T, H and W are multiples of
                the grid's. Samplers with `uses_video` need it for a draw; others ignore it.
            mask: used instead of a draw. [B, N] bool, True = masked, with `num_visible` False in each row; or a
                MaskSample, which may leave any number visible. It has B or B `num_masks` rows, clip by clip.
            generator: source of the draw's randomness; None means torch's default generator of the tokens' device.
                Dropout in the score network always takes the default generator.
            grid_size: (T, H, W) of these tokens, if it is not the sampler's own. K follows from the mask ratio, and
                learned positions are resampled.
            valid: [B, N] bool, True = a token that counts; None if all do. Others, of padding or without data, are
                never visible, have p = 0, and count in no loss. K does not depend on them. The scores do not see them:
                they are 0 to the score network.

        Raises:
            TypeError, ValueError: the tokens are not [B, N, D] or do not fill the grid; the sampler takes its own grid
                alone, or no `valid`; the video is missing or does not fit the tokens; the mask does not fit the tokens,
                or shows an invalid one; or a clip has too few valid tokens, see `adamae_sampler.mask.check_valid`.
        """
        check_tokens("tokens", tokens)
        grid = self.grid_size if grid_size is None else checked_grid(grid_size)
        if tokens.shape[1] != math.prod(grid):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: {tokens.shape[1]} tokens, but the grid {grid} has "
                f"{math.prod(grid)}. Leave out class tokens. For an input of another size call the sampler with "
                "grid_size=(frames // tubelet_size, height // patch_size, width // patch_size)."
            )
        num_visible = self.num_visible
        more: dict[str, Any] = {}
        if grid != self.grid_size:
            if not self.takes_grids:
                raise ValueError(
                    f"{type(self).__name__} draws for its own grid {self.grid_size}, and got {grid}. To draw for "
                    "others, give draw and complete an argument grid_size=None."
                )
            num_visible, more["grid_size"] = self.num_visible_at(grid), grid
        given = None if mask is None else self._given(mask, tokens, num_visible)
        if given is not None:
            num_visible, times = given.num_visible, given.mask.shape[0] // max(len(tokens), 1)
            if valid is None and given.valid is not None:
                valid = given.valid[:: max(times, 1)]
        if valid is not None:
            self._check_valid(valid, tokens, num_visible)
            tokens = tokens.where(valid[..., None], 0)
        if given is None:
            if self.uses_video:
                more["video"] = self.check_video(tokens, video, grid)
            if valid is not None:
                more["valid"] = valid
            drawn = self.draw(tokens, generator, **more)
            return drawn.replace(valid=rows_of(valid, drawn.mask))
        if valid is not None:
            given = _with_valid(given, repeat_rows(valid, times))
        if self.uses_video:
            more["video"] = video
        return self.complete(tokens, given, **more)

    def _given(self, mask: Tensor | MaskSample, tokens: Tensor, num_visible: int) -> MaskSample:
        if not isinstance(mask, (Tensor, MaskSample)):
            kind = type(mask).__name__
            raise TypeError(f"mask is {kind}, expected a bool tensor [B, N], True = masked, or a MaskSample.")
        shape = tuple((mask.mask if isinstance(mask, MaskSample) else mask).shape)
        if (
            len(shape) != 2
            or shape[1] != tokens.shape[1]
            or shape[0] not in (len(tokens), len(tokens) * self.num_masks)
        ):
            raise ValueError(
                f"mask has shape {shape}, expected {tuple(tokens.shape[:2])}: clips, tokens; or num_masks="
                f"{self.num_masks} rows for each clip."
            )
        return mask if isinstance(mask, MaskSample) else MaskSample.from_mask(mask, num_visible)

    def _check_valid(self, valid: Tensor, tokens: Tensor, num_visible: int) -> None:
        if not self.takes_valid:
            raise ValueError(
                f"{type(self).__name__} takes no valid. Give its draw an argument valid=None, [B, N] bool, and show "
                "none of the tokens where it is False."
            )
        check_valid(valid, num_visible)
        if valid.shape != tokens.shape[:2]:
            raise ValueError(
                f"valid has shape {tuple(valid.shape)}, expected {tuple(tokens.shape[:2])}: clips, tokens."
            )
        check_device("valid", valid, tokens.device)

    def check_video(self, tokens: Tensor, video: Tensor | None, grid_size: GridSize) -> Tensor:
        """The video, if it is one of the tokens' clips.

        Raises:
            TypeError: the video is no tensor, or neither uint8 nor floating point.
            ValueError: there is no video, or its shape does not fit the tokens and the grid.
        """
        name = type(self).__name__
        if video is None:
            raise ValueError(
                f"this {name} draws from the pixels and got no video. Pass it, sampler(tokens, video=video), with "
                "video [B, C, T, H, W]; or pass a mask."
            )
        if not isinstance(video, Tensor) or not (video.dtype == torch.uint8 or video.is_floating_point()):
            kind = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"video is {kind}, expected a uint8 or floating-point tensor [B, C, T, H, W].")
        shape = tuple(video.shape)
        if len(shape) != 5 or any(size % cells for size, cells in zip(shape[2:], grid_size, strict=True)):
            raise ValueError(
                f"video has shape {shape}, expected [B, C, T, H, W] with T, H and W multiples of the grid "
                f"{grid_size}. For [B, T, C, H, W] pass video.transpose(1, 2); for images video[:, :, None]."
            )
        if shape[0] != tokens.shape[0]:
            raise ValueError(f"video has {shape[0]} clips and tokens have {tokens.shape[0]}, expected the same clips.")
        if video.device != tokens.device:
            raise ValueError(f"video is on {video.device} and tokens are on {tokens.device}, expected one device.")
        return video

    @abc.abstractmethod
    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """A fresh mask for each clip."""

    def complete(
        self, tokens: Tensor, given: MaskSample, video: Tensor | None = None, grid_size: GridSize | None = None
    ) -> MaskSample:
        """The sample of a given mask, with the fields that this sampler adds to its own draws.

        Args:
            tokens: [B, N, D].
            given: the mask.
            video: what the caller passed, unchecked, with `uses_video`; else None.
            grid_size: the grid of the tokens; None for the sampler's own.
        """
        kept = {"decoded_idx": given.decoded_idx, "valid": given.valid, "held_out": given.held_out}
        return MaskSample(given.visible_idx, given.masked_idx, given.mask, **kept)

    def extra_repr(self) -> str:
        """For print(model)."""
        text = f"grid_size={self.grid_size}, mask_ratio={self.mask_ratio}, num_visible={self.num_visible}"
        return text if self.num_masks == 1 else f"{text}, num_masks={self.num_masks}"


def _with_valid(given: MaskSample, valid: Tensor) -> MaskSample:
    """A mask that the caller passed, of clips with invalid tokens."""
    if given.valid is not None and given.valid is not valid:
        require(
            (given.valid == valid).all(1),
            lambda row: f"valid of the given MaskSample differs from valid of the call in row {row}; pass it once.",
            "valid of the given MaskSample differs from valid of the call",
        )
    shown = ~valid.gather(1, given.visible_idx)
    require(
        ~shown.any(1),
        lambda row: (
            f"row {row} of the given mask shows {int(shown[row].sum())} tokens that are not valid, expected none. "
            "Mask them, or leave the mask out."
        ),
        "the given mask shows a token that is not valid",
    )
    return given.replace(valid=valid)


def checked_grid(grid_size: GridSize) -> GridSize:
    """The grid as a tuple. Raises ValueError unless it is three positive integers."""
    is_triple = isinstance(grid_size, (tuple, list, torch.Size)) and len(grid_size) == 3
    if not is_triple or any(not isinstance(each, (int, torch.SymInt)) or each < 1 for each in grid_size):
        raise ValueError(f"grid_size={grid_size}, expected three positive integers (T, H, W); T is 1 for images.")
    # index() makes plain numbers of torch.compile's symbols: each grid has its own graph.
    t, h, w = (operator.index(each) for each in grid_size)
    return t, h, w
