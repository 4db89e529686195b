"""Hides the tokens that are predicted to be hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample
from adamae_sampler.networks import Network
from adamae_sampler.ops.checks import at_least_fp32
from adamae_sampler.ops.draw import uniform_noise
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.draws import draw_classes, repeat_rows, rows_of
from adamae_sampler.sampler.schedule import Ramp
from adamae_sampler.sampler.scored import ScoredTokenSampler


class HardTokenSampler(ScoredTokenSampler):
    """Hides the tokens with the largest predicted error, and random others. The hard share grows over training.

    The idea is that of Hard Patches Mining (Wang et al., CVPR 2023; github.com/Haochen-Wang409/HPM). There a decoder
    predicts the errors, and a momentum teacher chooses the mask. Here a score network predicts the errors from the
    tokens, without a teacher. `ranking_loss` trains the network, and the tokens get no gradient from it.

    share(t) rises in a straight line from 0 to `hard_share`. The floor(share M) tokens with the largest predictions are
    masked for certain; of equal predictions random ones come first. The rest of the M masked tokens is drawn uniformly
    from the other tokens.

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask; K = floor(N (1 - ratio)).
        network: the network that predicts the errors, see `ScoredTokenSampler`.
        num_masks: R, masks of each clip; all have the same hard tokens.
        hard_share: share of the masked tokens that is hard, at the end of the ramp.
        ramp_steps: draws in training until the share is reached, see `Ramp`. Each batch is a draw, so give a share of
            your run's batches. A mask that the caller passes counts none.

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

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Masks the hardest tokens, and draws the others uniformly."""
        num_visible = self.num_drawn(grid_size)
        difficulty = at_least_fp32(self.scores(tokens, grid_size))
        ranked = difficulty.detach()
        count: int | Tensor = tokens.shape[1]
        if valid is not None:
            ranked, count = ranked.where(valid, -torch.inf), valid.sum(1, keepdim=True)
        rank = _random_ties(ranked, generator)
        num_hard = (self.share() * (count - num_visible) + _ROUNDING).floor()
        chosen = repeat_rows((rank >= num_hard).float(), self.num_masks)
        drawn = draw_classes(chosen, num_visible, generator, valid)
        return _with_difficulty(drawn, repeat_rows(difficulty, self.num_masks), rows_of(valid, drawn.mask))

    def complete(
        self, tokens: Tensor, given: MaskSample, video: Tensor | None = None, grid_size: GridSize | None = None
    ) -> MaskSample:
        """The given mask with the predicted errors, so that the ranking loss works as for a drawn mask."""
        times = given.mask.shape[0] // max(tokens.shape[0], 1)
        difficulty = repeat_rows(at_least_fp32(self.scores(tokens, grid_size)), times)
        return _with_difficulty(super().complete(tokens, given, video, grid_size), difficulty, given.valid)


def _random_ties(difficulty: Tensor, generator: torch.Generator | None) -> Tensor:
    """[B, N] -> the place of each token in the order of its row, 0 for the largest. NaN comes first."""
    shuffled = uniform_noise(difficulty.shape, difficulty.device, generator).argsort(1)
    order = difficulty.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(difficulty.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, shuffled.gather(1, order), place)


def _with_difficulty(sample: MaskSample, difficulty: Tensor, valid: Tensor | None) -> MaskSample:
    nonfinite = ~difficulty.detach().isfinite()
    nonfinite = nonfinite if valid is None else nonfinite & valid
    return sample.replace(difficulty=difficulty, num_nonfinite=nonfinite.sum(1))


_ROUNDING = 1e-3  # above the rounding error of share M in fp32
