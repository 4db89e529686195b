"""AdaMAE's sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample
from adamae_sampler.networks import Network
from adamae_sampler.ops.draw import token_log_probs
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.draws import draw_beside_targets, draw_valid, repeat_rows
from adamae_sampler.sampler.schedule import Ramp
from adamae_sampler.sampler.scored import ScoredTokenSampler


class AdaptiveTokenSampler(ScoredTokenSampler):
    """AdaMAE's sampler: a network scores all tokens, then K are drawn from the softmax of the scores (Algorithm 1).

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask; K = floor(N (1 - ratio)).
        network: the score network, see `ScoredTokenSampler`.
        detach_tokens: whether to stop the gradient of the sampling loss before the tokenizer. The official code does
            not stop it.
        num_masks: R, masks of each clip, see `TokenSampler`; all are drawn from one p.
        temperature: p = softmax(scores / temperature); a higher temperature makes p more even.
        exploration: share of p that is spread evenly over all tokens, so that every token can be drawn. A `Ramp` from
            1.0 starts with random masks: `exploration=Ramp(1.0, 0.1, 1000)`.
        target_ratio: share of a clip's tokens that are set aside at random before a draw in training. They are never
            visible, and they alone are decoded and have errors. So the error is that of tokens which no mask chose; it
            cannot fall because a hard token is shown and leaves the mean. 0 decodes whatever is masked.

    Raises:
        ValueError: an unknown network; a number out of range; or targets that leave too few tokens to draw from.

    >>> import torch
    >>> sampler = AdaptiveTokenSampler(embed_dim=64, grid_size=(8, 14, 14), mask_ratio=0.95)
    >>> sample = sampler(torch.randn(2, 1568, 64))
    >>> sample.visible_idx.shape, sample.log_probs.shape
    (torch.Size([2, 78]), torch.Size([2, 1568]))
    """

    def __init__(
        self,
        embed_dim: int,
        grid_size: GridSize,
        mask_ratio: float = 0.95,
        network: Network | nn.Module = "mha",
        detach_tokens: bool = False,
        num_masks: int = 1,
        temperature: float = 1.0,
        exploration: float | Ramp = 0.0,
        target_ratio: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, grid_size, mask_ratio, network, detach_tokens, num_masks)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}, expected a positive number; 1 leaves the scores as they are.")
        if isinstance(exploration, Ramp):
            if not (0 <= exploration.start <= 1 and 0 <= exploration.end <= 1):
                raise ValueError(f"exploration={exploration}, expected a ramp between shares of p from 0 to 1.")
        elif not 0 <= exploration < 1:
            raise ValueError(f"exploration={exploration}, expected a share of p from 0 to below 1, such as 0.05.")
        self.temperature = temperature
        self.exploration = exploration
        self.target_ratio = target_ratio
        self._num_targets(self.num_tokens, self.num_visible)  # checks the ratio

    def logits(self, tokens: Tensor, grid_size: GridSize | None = None, valid: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N]; p = softmax(logits). This is no step of an exploration's ramp; a draw is one."""
        scores = self.scores(tokens, grid_size)
        if valid is not None:
            scores = scores.where(valid, -torch.inf)
        if self.temperature != 1:
            scores = scores / self.temperature
        if isinstance(self.exploration, Ramp):
            share = self.exploration.value().clamp(_TINY, 1.0)
            return self._explore(scores, torch.log1p(-share), share.log() - _log_count(scores, valid))
        if self.exploration:
            own, even = math.log1p(-self.exploration), math.log(self.exploration) - _log_count(scores, valid)
            return self._explore(scores, own, even)
        return scores

    def _explore(self, scores: Tensor, own: float | Tensor, even: float | Tensor) -> Tensor:
        """log((1 - exploration) p + exploration / N), given log(1 - exploration) and log(exploration / N)."""
        finite = scores.isfinite()  # non-finite scores keep their meaning: drawn first or last, and counted
        log_probs, _ = token_log_probs(torch.where(finite, scores, -torch.inf))
        mixed = torch.logaddexp(log_probs + own, torch.zeros_like(log_probs) + even)
        return torch.where(finite, mixed, scores.to(mixed.dtype))

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws K tokens of each clip from p, without replacement; with R masks, R times."""
        logits = repeat_rows(self.logits(tokens, grid_size, valid), self.num_masks)
        if isinstance(self.exploration, Ramp):
            self.exploration.count()
        num_visible = self.num_drawn(grid_size)
        if self.training and self.target_ratio:
            num_targets = self._num_targets(logits.shape[1], num_visible)
            return draw_beside_targets(logits, num_visible, num_targets, self.num_masks, generator, valid)
        return draw_valid(logits, num_visible, generator, valid)

    def _num_targets(self, num_tokens: int, num_visible: int) -> int:
        if not self.target_ratio:
            return 0
        if not 0 < self.target_ratio < 1:
            raise ValueError(
                f"target_ratio={self.target_ratio}, expected a share of the tokens below 1, or 0 for none."
            )
        number, most = int(num_tokens * self.target_ratio + 1e-9), num_tokens - num_visible - 1
        if not 1 <= number <= most:
            raise ValueError(
                f"target_ratio={self.target_ratio} sets {number} of {num_tokens} tokens aside, expected 1 to {most}: "
                f"{num_visible} others are visible, and one more is masked. Use between {1 / num_tokens:.3g} and "
                f"{math.floor(1e3 * most / num_tokens) / 1e3:.3g}."
            )
        return number

    def complete(
        self, tokens: Tensor, given: MaskSample, video: Tensor | None = None, grid_size: GridSize | None = None
    ) -> MaskSample:
        """The given mask with the sampler's log-probabilities, so the losses work as for a drawn mask."""
        times = max(given.mask.shape[0] // max(tokens.shape[0], 1), 1)
        valid = None if given.valid is None else given.valid[::times]
        log_probs, num_nonfinite = token_log_probs(repeat_rows(self.logits(tokens, grid_size, valid), times))
        if given.valid is not None:
            num_nonfinite = num_nonfinite - (~given.valid).sum(1)
        return (
            super().complete(tokens, given, video, grid_size).replace(log_probs=log_probs, num_nonfinite=num_nonfinite)
        )


def _log_count(scores: Tensor, valid: Tensor | None) -> float | Tensor:
    """The log of the number of tokens of each row over which an even share is spread."""
    return math.log(scores.shape[1]) if valid is None else valid.sum(1, keepdim=True, dtype=scores.dtype).log()


_TINY = 1e-20  # the log of a ramp's share stays finite, and so do its gradients
