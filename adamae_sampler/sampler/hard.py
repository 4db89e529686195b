"""Hides the tokens that are predicted to be hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.checks import at_least_fp32
from adamae_sampler.sampler.base import GridSize
from adamae_sampler.sampler.draws import draw_classes, repeat_rows
from adamae_sampler.sampler.schedule import Ramp
from adamae_sampler.sampler.scored import Network, ScoredTokenSampler


class HardTokenSampler(ScoredTokenSampler):
    """Hides the tokens with the largest predicted error, and random others. The hard share grows over training.

    The idea is that of Hard Patches Mining (Wang et al., CVPR 2023; github.com/Haochen-Wang409/HPM). There a decoder
    predicts the errors, and a momentum teacher chooses the mask. Here a score network predicts the errors from the
    tokens, without a teacher. `ranking_loss` trains the network, and the tokens get no gradient from it.

    share(t) rises in a straight line from 0 to `hard_share`. The floor(share M) tokens with the largest predictions are
    masked for certain. The rest of the M masked tokens is drawn uniformly from the other tokens.

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask; K = floor(N (1 - ratio)).
        network: the network that predicts the errors, see `ScoredTokenSampler`.
        num_masks: R, masks of each clip; all have the same hard tokens.
        hard_share: share of the masked tokens that is hard, at the end of the ramp.
        ramp_steps: draws in training until the share is reached, see `Ramp`. Give a share of your optimiser
            steps. A mask that the caller passes counts none.

    Raises:
        ValueError: an unknown network; a number out of range.

    >>> import torch
    >>> sampler = HardTokenSampler(embed_dim=64, grid_size=(8, 14, 14), mask_ratio=0.9)
    >>> sampler(torch.randn(2, 1568, 64)).difficulty.shape
    torch.Size([2, 1568])
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: GridSize,
        mask_ratio: float = 0.9,
        network: Network | nn.Module = "mha",
        *,
        num_masks: int = 1,
        hard_share: float = 0.5,
        ramp_steps: int = 10_000,
    ) -> None:
        super().__init__(embed_dim, grid_size, mask_ratio, network, True, num_masks)
        if not 0 <= hard_share <= 1:
            raise ValueError(
                f"hard_share={hard_share}, expected a share of the masked tokens from 0 to 1, such as 0.5."
            )
        if not isinstance(ramp_steps, int) or ramp_steps < 1:
            raise ValueError(f"ramp_steps={ramp_steps!r}, expected a whole number of draws in training, 1 or more.")
        self.share = Ramp(0.0, hard_share, ramp_steps)

    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """Masks the hardest tokens, and draws the others uniformly."""
        difficulty, num_nonfinite = self._predict(tokens, self.num_masks)
        order = difficulty.detach().argsort(dim=1, descending=True, stable=True)  # NaN first
        place = torch.arange(self.num_tokens, device=order.device)
        rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))  # [B R, N], 0 for the hardest token
        num_hard = (self.share() * (self.num_tokens - self.num_visible) + _ROUNDING).floor()
        drawn = draw_classes((rank >= num_hard).float(), self.num_visible, generator)
        return drawn._replace(difficulty=difficulty, num_nonfinite=num_nonfinite)

    def complete(self, tokens: Tensor, given: MaskSample) -> MaskSample:
        """The given mask with the predicted errors, so that the ranking loss works as for a drawn mask."""
        difficulty, num_nonfinite = self._predict(tokens, given.mask.shape[0] // max(tokens.shape[0], 1))
        return super().complete(tokens, given)._replace(difficulty=difficulty, num_nonfinite=num_nonfinite)

    def _predict(self, tokens: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """[B, N, D] -> the predicted errors [B times, N], and how many of a row are not finite [B times]."""
        difficulty = repeat_rows(at_least_fp32(self.scores(tokens)), times)
        return difficulty, (~difficulty.detach().isfinite()).sum(1)


_ROUNDING = 1e-3  # above the rounding error of share M in fp32
