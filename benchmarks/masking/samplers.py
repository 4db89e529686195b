"""The samplers of arms that no name of the library makes, each from the setting of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adamae_sampler import AdaptiveTokenSampler, HardTokenSampler, MaskSample, MotionTokenSampler, Ramp
from adamae_sampler.networks import MHAScoreNetwork
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler import TokenSampler, draw_valid
from benchmarks.masking.train import Setting

Maker = Callable[[Setting], TokenSampler]
_TARGETS = 0.25  # share of the tokens that `TargetSetSampler` hides, whatever their p


def motion(floor: float) -> Maker:
    """Shows what moves; a larger floor shows less of it."""
    return lambda setting: MotionTokenSampler(setting.cut.grid, setting.mask_ratio, source="pixels", floor=floor)


class HidingSampler(MotionTokenSampler):
    """Hides what moves: p in inverse proportion to `MotionTokenSampler`'s."""

    def log_probs(
        self,
        tokens: Tensor,
        video: Tensor | None = None,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """log p, [B, N], without a gradient."""
        opposite = -super().log_probs(tokens, video, grid_size, valid)
        return (opposite if valid is None else opposite.where(valid, -torch.inf)).log_softmax(1)


def hiding(floor: float) -> Maker:
    """Hides what moves; a larger floor hides less of it."""
    return lambda setting: HidingSampler(setting.cut.grid, setting.mask_ratio, source="pixels", floor=floor)


def hard(setting: Setting) -> TokenSampler:
    """`HardTokenSampler` with a ramp that lasts the whole run."""
    width, grid = setting.model["embed_dim"], setting.cut.grid
    return HardTokenSampler(width, grid, setting.mask_ratio, ramp_steps=setting.steps)


def learned(kind: type[AdaptiveTokenSampler] = AdaptiveTokenSampler, **arguments: Any) -> Maker:
    """A learned sampler with other arguments than the paper's."""
    return lambda setting: kind(setting.model["embed_dim"], setting.cut.grid, setting.mask_ratio, **arguments)


def even_start(kind: type[AdaptiveTokenSampler] = AdaptiveTokenSampler) -> Maker:
    """A learned sampler whose scores are all 0 at the start, so that it starts as random masking."""

    def make(setting: Setting) -> TokenSampler:
        network = MHAScoreNetwork(setting.model["embed_dim"], math.prod(setting.cut.grid))
        nn.init.zeros_(network.head.weight)
        return kind(setting.model["embed_dim"], setting.cut.grid, setting.mask_ratio, network)

    return make


def ramped(setting: Setting) -> TokenSampler:
    """A learned sampler that starts with random masks; from the middle of the run on, 10% exploration is left."""
    ramp = Ramp(1.0, 0.1, max(1, setting.steps // 2))
    return AdaptiveTokenSampler(setting.model["embed_dim"], setting.cut.grid, setting.mask_ratio, exploration=ramp)


class MotionPriorSampler(AdaptiveTokenSampler):
    """A learned sampler with a prior from motion: its scores are added to the prior's log p."""

    uses_video = True

    def __init__(self, *args: Any, floor: float = 0.8, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prior = MotionTokenSampler(self.grid_size, self.mask_ratio, source="pixels", floor=floor)

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        video: Tensor | None = None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws K tokens of each clip from p, without replacement."""
        logits = self.logits(tokens, grid_size, valid) + self._prior.log_probs(tokens, video, grid_size, valid)
        return draw_valid(logits, self.num_drawn(grid_size), generator, valid)

    def complete(
        self, tokens: Tensor, given: MaskSample, video: Tensor | None = None, grid_size: GridSize | None = None
    ) -> MaskSample:
        """The given mask with the log-probabilities of both."""
        logits = self.logits(tokens, grid_size) + self._prior.log_probs(tokens, video, grid_size)
        return TokenSampler.complete(self, tokens, given)._replace(log_probs=logits.log_softmax(1))


class TargetSetSampler(AdaptiveTokenSampler):
    """A learned sampler that hides a random quarter of a clip's tokens, another in each step. Their log p is minus
    infinity."""

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws K of each clip's other tokens from p, without replacement."""
        noise = torch.rand(tokens.shape[:2], device=tokens.device, generator=generator)
        targets = noise.topk(round(_TARGETS * tokens.shape[1]), dim=1)[1]
        logits = self.logits(tokens, grid_size, valid).scatter(1, targets, -torch.inf)
        return draw_valid(logits, self.num_drawn(grid_size), generator, valid)
