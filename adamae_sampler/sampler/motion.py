"""Shows what moves: p from the change between time steps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.draws import draw_valid, repeat_rows

Source = Literal["tokens", "pixels"]


class MotionTokenSampler(TokenSampler):
    """Draws K tokens from p, which is larger where a token changes. Nothing is learned. K = floor(N (1 - ratio)).

    p_i = (1 - floor) c_i / sum(c) + floor / N. Here c_i is the change of token i from the time step before. The first
    time step takes its change to the second. A clip in which nothing changes has an even p. A token whose change is
    not finite is drawn first if it is infinite, last if it is NaN, and `num_nonfinite` counts it.

    With "tokens", c_i is the L2 norm of the difference of two tokens. This is the criterion of EVEREST (Hwang et al.,
    ICML 2024; github.com/sunilhoho/EVEREST). EVEREST drops all tokens but those of the largest c, and masks some of
    these. Here all tokens stay, and the visible ones are drawn. With "pixels", c_i is the mean absolute difference of
    the token's pixels, whatever the tokens are.

    Args:
        grid_size: (T, H, W), see `TokenSampler`; T of 2 or more.
        mask_ratio: share of tokens to mask.
        num_masks: R, masks of each clip, see `TokenSampler`; all are drawn from one p.
        source: "tokens" or "pixels". With "pixels" a draw needs the video.
        floor: share of p that is spread evenly over all tokens, above 0, up to 1.

    Raises:
        ValueError: a grid of one time step, an unknown source, or a number out of range.
    """

    def __init__(
        self,
        grid_size: GridSize,
        mask_ratio: float = 0.9,
        *,
        num_masks: int = 1,
        source: Source = "tokens",
        floor: float = 0.2,
    ) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        if source not in get_args(Source):
            raise ValueError(f"source={source!r}, expected 'tokens' or 'pixels'.")
        if not 0 < floor <= 1:
            raise ValueError(
                f"floor={floor}, expected a share of p above 0, up to 1, such as 0.2. With 0, a token that does not "
                "change could never be drawn."
            )
        self.num_visible = self.num_visible_at(self.grid_size)
        self.source = source
        self.floor = floor

    def num_visible_at(self, grid_size: GridSize) -> int:
        """K at a grid of two time steps or more."""
        if grid_size[0] < 2:
            raise ValueError(
                f"grid_size={grid_size} has one time step, expected two or more: in an image nothing moves. Use "
                "another sampler for images."
            )
        return super().num_visible_at(grid_size)

    @property
    def uses_video(self) -> bool:  # type: ignore[override]
        """Whether a draw needs the pixels."""
        return self.source == "pixels"

    @torch.no_grad()
    def log_probs(
        self,
        tokens: Tensor,
        video: Tensor | None = None,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """log p, [B, N] fp32, without a gradient.

        The samples of this sampler have no `log_probs`, since no loss trains this p.

        Args:
            tokens: [B, N, D].
            video: [B, C, T, H, W], needed with "pixels", see `TokenSampler.forward`.
            grid_size: (T, H, W) of the tokens, if it is not the sampler's own.
            valid: [B, N] bool, see `TokenSampler.forward`. A change counts where both tokens are valid, else it is 0.

        Raises:
            TypeError, ValueError: the video is missing or does not fit the tokens.
        """
        grid_size = grid_size or self.grid_size
        if self.uses_video:
            change = _of_pixels(self.check_video(tokens, video, grid_size), grid_size)
        else:
            change = _of_tokens(tokens, grid_size)
        if valid is not None:
            steps = valid.unflatten(1, (grid_size[0], -1))
            change = change.flatten(2).where(steps[:, 1:] & steps[:, :-1], 0)
        change = torch.cat([change[:, :1], change], 1).flatten(1)  # [B, N]
        finite = change.isfinite()
        total = change.where(finite, 0).sum(1, keepdim=True)
        count = tokens.shape[1] if valid is None else valid.sum(1, keepdim=True, dtype=change.dtype)
        share = torch.where(total == 0, 1 / count, change / total)
        log_probs = ((1 - self.floor) * share + self.floor / count).log().where(finite, change)
        return log_probs if valid is None else log_probs.where(valid, -torch.inf)

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        video: Tensor | None = None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws K tokens of each clip from p, without replacement; with R masks, R times."""
        log_probs = repeat_rows(self.log_probs(tokens, video, grid_size, valid), self.num_masks)
        return draw_valid(log_probs, self.num_drawn(grid_size), generator, valid).replace(log_probs=None)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{super().extra_repr()}, source={self.source!r}, floor={self.floor}"


def _of_tokens(tokens: Tensor, grid_size: GridSize) -> Tensor:
    """[B, N, D] -> [B, T - 1, H W]."""
    steps = tokens.unflatten(1, (grid_size[0], -1))  # [B, T, H W, D]
    return torch.linalg.vector_norm(steps.diff(dim=1), dim=-1, dtype=_fp32_or_fp64(tokens))


def _of_pixels(video: Tensor, grid_size: GridSize) -> Tensor:
    """[B, C, frames, height, width] -> [B, T - 1, H, W]."""
    time, height, width = grid_size
    frames = video.shape[2] // time
    before, after = video[:, :, :-frames], video[:, :, frames:]
    # The larger minus the smaller is right for uint8 too, without a copy of the video in fp32.
    change = torch.maximum(before, after) - torch.minimum(before, after)
    cells = change.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (time - 1, -1))
    # [B, C, T - 1, frames, H, height, W, width]. A sum does for the mean: c is divided by its sum.
    return cells.sum((1, 3, 5, 7), dtype=_fp32_or_fp64(video))


def _fp32_or_fp64(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
