"""Token samplers: modules from tokens [B, N, D] to a MaskSample.

One sampler is learned (adaptive), three are fixed (random, tube, frame). All have the same call, so a training script
compares them by changing one argument.
"""

from __future__ import annotations

import abc
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample, num_masked_units, num_visible_tokens
from adamae_sampler.networks import MHAScoreNetwork, MLPScoreNetwork, PooledScoreNetwork
from adamae_sampler.ops import draw_mask
from adamae_sampler.ops.checks import check_tokens
from adamae_sampler.ops.draw import token_log_probs

GridSize = tuple[int, int, int]


class TokenSampler(nn.Module, abc.ABC):
    """Base of all samplers: the grid, the ratio, the checks, and masks that the caller passes.

    Args:
        grid_size: (T, H, W), tokens in time, height and width; N = T H W tokens in t-h-w order.
        mask_ratio: share of tokens to mask, strictly between 0 and 1.
        num_masks: R, masks of each clip. A sample then has B R rows, clip by clip.
    """

    num_visible: int  # K; set by each sampler, since each rounds to whole units of its own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "describe" in vars(cls):
            raise TypeError(f"{cls.__name__}.describe is now called complete; rename it.")

    def __init__(self, grid_size: GridSize, mask_ratio: float, num_masks: int = 1) -> None:
        super().__init__()
        if not isinstance(num_masks, int) or num_masks < 1:
            raise ValueError(f"num_masks={num_masks!r}, expected a whole number of masks for each clip, 1 or more.")
        self.num_masks = num_masks
        is_triple = isinstance(grid_size, (tuple, list)) and len(grid_size) == 3
        if not is_triple or any(not isinstance(each, int) or each < 1 for each in grid_size):
            raise ValueError(f"grid_size={grid_size}, expected three positive integers (T, H, W); T is 1 for images.")
        self.grid_size: GridSize = (grid_size[0], grid_size[1], grid_size[2])
        self.mask_ratio = mask_ratio

    @property
    def num_tokens(self) -> int:
        """N, tokens of a clip."""
        return math.prod(self.grid_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | MaskSample | None = None,
        generator: torch.Generator | None = None,
    ) -> MaskSample:
        """Draws a mask for each clip, or takes the given one.

        Args:
            tokens: [B, N, D].
            mask: used instead of a draw. [B, N] bool, True = masked, with `num_visible` False in each row; or a
                MaskSample, which may leave any number visible. It has B or B `num_masks` rows, clip by clip.
            generator: source of the draw's randomness; None means torch's default generator of the tokens' device.
                Dropout in the score network always takes the default generator.

        Raises:
            TypeError, ValueError: the tokens are not [B, N, D] or do not fill the grid; or the mask does not fit the
                tokens.
        """
        check_tokens("tokens", tokens)
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: {tokens.shape[1]} tokens, but the grid {self.grid_size} "
                f"has {self.num_tokens}. Build the sampler with grid_size=(frames // tubelet_size, height "
                "// patch_size, width // patch_size) of your input, and leave out class tokens."
            )
        if mask is None:
            return self.draw(tokens, generator)
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
        given = mask if isinstance(mask, MaskSample) else MaskSample.from_mask(mask, self.num_visible)
        return self.complete(tokens, given)

    @abc.abstractmethod
    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """A fresh mask for each clip."""

    def complete(self, tokens: Tensor, given: MaskSample) -> MaskSample:
        """The sample of a given mask, with the fields that this sampler adds to its own draws."""
        return MaskSample(given.visible_idx, given.masked_idx, given.mask, decoded_idx=given.decoded_idx)

    def extra_repr(self) -> str:
        """For print(model)."""
        text = f"grid_size={self.grid_size}, mask_ratio={self.mask_ratio}, num_visible={self.num_visible}"
        return text if self.num_masks == 1 else f"{text}, num_masks={self.num_masks}"


class AdaptiveTokenSampler(TokenSampler):
    """AdaMAE's sampler: a network scores all tokens, then K are drawn from the softmax of the scores (Algorithm 1).

    Args:
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W), see `TokenSampler`.
        mask_ratio: share of tokens to mask; K = floor(N (1 - ratio)).
        network: "mha" (the paper's), "mlp", "pooled" (`PooledScoreNetwork`, a few percent of the cost), or a module
            [B, N, D] -> [B, N], such as `MHAScoreNetwork` with a depth and width of your choice.
        detach_tokens: whether to stop the gradient of the sampling loss before the tokenizer. The official code does
            not stop it.
        num_masks: R, masks of each clip, see `TokenSampler`; all are drawn from one p.
        temperature: p = softmax(scores / temperature); a higher temperature makes p more even.
        exploration: share of p that is spread evenly over all tokens, so that every token can be drawn.

    Raises:
        ValueError: an unknown network; a number out of range.

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
        network: Literal["mha", "mlp", "pooled"] | nn.Module = "mha",
        detach_tokens: bool = False,
        num_masks: int = 1,
        temperature: float = 1.0,
        exploration: float = 0.0,
    ) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = num_visible_tokens(self.num_tokens, mask_ratio)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}, expected a positive number; 1 leaves the scores as they are.")
        if not 0 <= exploration < 1:
            raise ValueError(f"exploration={exploration}, expected a share of p from 0 to below 1, such as 0.05.")
        self.temperature = temperature
        self.exploration = exploration
        self.embed_dim = embed_dim
        self.detach_tokens = detach_tokens
        if isinstance(network, nn.Module):
            self.network = network
        elif network == "mha":
            self.network = MHAScoreNetwork(embed_dim, self.num_tokens)
        elif network == "mlp":
            self.network = MLPScoreNetwork(embed_dim)
        elif network == "pooled":
            self.network = PooledScoreNetwork(embed_dim, self.grid_size)
        else:
            raise ValueError(
                f"score network {network!r}, expected 'mha', 'mlp', 'pooled' or a module [B, N, D] -> [B, N]."
            )

    def scores(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N], the network's scores, before temperature and exploration."""
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"tokens are {tokens.shape[-1]} wide, expected embed_dim={self.embed_dim}. Build the sampler with the "
                "width of the tokens."
            )
        scores: Tensor = self.network(tokens.detach() if self.detach_tokens else tokens)
        if scores.shape != tokens.shape[:2]:
            raise ValueError(
                f"the score network gave {tuple(scores.shape)} for tokens {tuple(tokens.shape)}, expected "
                f"{tuple(tokens.shape[:2])}: one score for each token. Use squeeze(-1) if the last axis is 1."
            )
        return scores

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N]; p = softmax(logits)."""
        scores = self.scores(tokens)
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.exploration:
            finite = scores.isfinite()  # non-finite scores keep their meaning: drawn first or last, and counted
            log_probs, _ = token_log_probs(torch.where(finite, scores, -torch.inf))
            even = torch.full_like(log_probs, math.log(self.exploration / self.num_tokens))
            mixed = torch.logaddexp(log_probs + math.log1p(-self.exploration), even)
            scores = torch.where(finite, mixed, scores.to(mixed.dtype))
        return scores

    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """Draws K tokens of each clip from p, without replacement; with R masks, R times."""
        logits = _repeat_rows(self.logits(tokens), self.num_masks)
        return draw_mask(logits, self.num_visible, generator=generator)

    def complete(self, tokens: Tensor, given: MaskSample) -> MaskSample:
        """The given mask with the sampler's log-probabilities, so the losses work as for a drawn mask."""
        logits = _repeat_rows(self.logits(tokens), given.mask.shape[0] // max(tokens.shape[0], 1))
        return given._replace(**dict(zip(("log_probs", "num_nonfinite"), token_log_probs(logits), strict=True)))


class RandomTokenSampler(TokenSampler):
    """Shows K tokens; every set of K is equally likely, as in MAE and MAE-ST. K = floor(N (1 - ratio))."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.9, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = num_visible_tokens(self.num_tokens, mask_ratio)

    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """Draws K of N tokens uniformly."""
        return _draw_uniform(tokens, self.num_masks, self.num_tokens, self.num_visible, generator)


class TubeTokenSampler(TokenSampler):
    """Masks the same random spatial positions in all time steps: floor(H W ratio) of them, as VideoMAE rounds."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.9, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        frames, positions = grid_size[0], grid_size[1] * grid_size[2]
        self.visible_positions = positions - num_masked_units(positions, mask_ratio, "spatial positions in a frame")
        self.num_visible = frames * self.visible_positions

    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """Draws spatial positions uniformly, then repeats them over time."""
        frames, positions = self.grid_size[0], self.grid_size[1] * self.grid_size[2]
        frame = _draw_uniform(tokens, self.num_masks, positions, self.visible_positions, generator)
        start = torch.arange(frames, device=tokens.device)[:, None] * positions  # [T, 1]
        return MaskSample(
            visible_idx=(start + frame.visible_idx[:, None]).flatten(1),  # [B, T, positions] -> [B, K]
            masked_idx=(start + frame.masked_idx[:, None]).flatten(1),
            mask=frame.mask.repeat(1, frames),
        )


class FrameTokenSampler(TokenSampler):
    """Masks whole time steps: floor(T ratio) of them, so a ratio of 0.95 masks 7 of 8."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.875, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.visible_frames = grid_size[0] - num_masked_units(grid_size[0], mask_ratio, "time steps")
        self.num_visible = self.visible_frames * grid_size[1] * grid_size[2]

    def draw(self, tokens: Tensor, generator: torch.Generator | None) -> MaskSample:
        """Draws time steps uniformly; all spatial positions of a step go with it."""
        frames, positions = self.grid_size[0], self.grid_size[1] * self.grid_size[2]
        steps = _draw_uniform(tokens, self.num_masks, frames, self.visible_frames, generator)
        position = torch.arange(positions, device=tokens.device)  # [positions]
        return MaskSample(
            # [B, steps, positions] -> [B, K]
            visible_idx=(steps.visible_idx[:, :, None] * positions + position).flatten(1),
            masked_idx=(steps.masked_idx[:, :, None] * positions + position).flatten(1),
            mask=steps.mask.repeat_interleave(positions, dim=1),
        )


def draw_decoded(sample: MaskSample, num_decoded: int, generator: torch.Generator | None = None) -> MaskSample:
    """Adds `decoded_idx` to a sample: `num_decoded` masked tokens of each row, drawn uniformly.

    All masked tokens are equally likely to be decoded. So the mean error of the decoded tokens is an unbiased estimate
    of the mean error of all masked tokens, for a decoder that sees this many mask tokens.

    Args:
        sample: a mask.
        num_decoded: M', from 1 to M.
        generator: source of randomness.
    """
    num_masked = sample.masked_idx.shape[1]
    if num_decoded == num_masked:
        return sample
    even = torch.zeros(sample.masked_idx.shape, device=sample.masked_idx.device)
    chosen = draw_mask(even, num_decoded, generator=generator).visible_idx  # [B, M'], ascending
    return sample._replace(decoded_idx=sample.masked_idx.gather(1, chosen))


def _repeat_rows(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 0)


def _draw_uniform(
    tokens: Tensor, num_masks: int, num_units: int, num_visible: int, generator: torch.Generator | None
) -> MaskSample:
    scores = torch.zeros(tokens.shape[0] * num_masks, num_units, device=tokens.device)
    drawn = draw_mask(scores, num_visible, generator=generator)
    return MaskSample(drawn.visible_idx, drawn.masked_idx, drawn.mask)  # there is no p to learn
