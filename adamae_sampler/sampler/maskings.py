"""The samplers by name, for models and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from adamae_sampler.networks import make_network
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.adaptive import AdaptiveTokenSampler
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.block import BlockTokenSampler
from adamae_sampler.sampler.fixed import FrameTokenSampler, RandomTokenSampler, TubeTokenSampler
from adamae_sampler.sampler.grid import GridTokenSampler
from adamae_sampler.sampler.hard import HardTokenSampler
from adamae_sampler.sampler.motion import MotionTokenSampler
from adamae_sampler.sampler.scored import ScoredTokenSampler

Masking = Literal["adaptive", "random", "tube", "frame", "block", "grid", "motion", "hard"]

MASKINGS: Mapping[str, type[TokenSampler]] = {
    "adaptive": AdaptiveTokenSampler,
    "random": RandomTokenSampler,
    "tube": TubeTokenSampler,
    "frame": FrameTokenSampler,
    "block": BlockTokenSampler,
    "grid": GridTokenSampler,
    "motion": MotionTokenSampler,
    "hard": HardTokenSampler,
}

PAPER_RATIO = 0.95  # for models without a ratio of their own

# Settings that only some maskings take, and their defaults.
_NETWORK: Mapping[str, Any] = {"score_network": "mha", "score_depth": None, "score_width": None}
_LEARNED: Mapping[str, Any] = {**_NETWORK, "temperature": 1.0, "exploration": 0.0, "target_ratio": 0.0}


def settings_of(masking: str) -> tuple[str, ...]:
    """Names of the settings that this masking takes, of those that `make_sampler` calls `learned`."""
    return {"adaptive": tuple(_LEARNED), "hard": tuple(_NETWORK)}.get(masking, ())


def make_sampler(
    masking: Masking | TokenSampler,
    embed_dim: int,
    grid_size: GridSize,
    mask_ratio: float | None,
    num_masks: int,
    learned: Mapping[str, Any],
) -> TokenSampler:
    """The sampler of a model that has the pixels of its tokens.

    Args:
        masking: a key of `MASKINGS`, or a sampler, which is checked and returned.
        embed_dim: D, width of the tokens.
        grid_size: (T, H, W) of the tokens.
        mask_ratio: share of tokens to mask; None for 0.95, or the ratio of a given sampler.
        num_masks: R, masks of each clip.
        learned: values of `score_network`, `score_depth`, `score_width`, `temperature`, `exploration` and
            `target_ratio`.

    Raises:
        ValueError: the masking is unknown, does not take a setting that differs from its default, or is a sampler for
            other tokens.
    """
    _check_settings(masking, learned)
    if isinstance(masking, TokenSampler):
        _check_fits(masking, embed_dim, grid_size, mask_ratio, num_masks)
        return masking
    if masking not in MASKINGS:
        raise ValueError(f"masking={masking!r}, expected {', '.join(map(repr, MASKINGS))} or a TokenSampler.")
    mask_ratio = PAPER_RATIO if mask_ratio is None else mask_ratio
    kind: Any = MASKINGS[masking]
    width = {"embed_dim": embed_dim} if issubclass(kind, ScoredTokenSampler) else {}
    settings = {name: learned[name] for name in settings_of(masking) if name not in _NETWORK}
    if issubclass(kind, ScoredTokenSampler):
        settings["network"] = _network(embed_dim, grid_size, **{name: learned[name] for name in _NETWORK})
    settings |= {"source": "pixels"} if kind is MotionTokenSampler else {}
    sampler: TokenSampler = kind(**width, grid_size=grid_size, mask_ratio=mask_ratio, num_masks=num_masks, **settings)
    return sampler


def _network(embed_dim: int, grid_size: GridSize, score_network: Any, score_depth: Any, score_width: Any) -> nn.Module:
    if not isinstance(score_network, nn.Module):
        return make_network(score_network, embed_dim, grid_size, score_depth, score_width)
    if score_depth is not None or score_width is not None:
        raise ValueError(
            f"score_depth={score_depth}, score_width={score_width}: the {type(score_network).__name__} given has its "
            "own. Leave them out."
        )
    return score_network


def _check_settings(masking: Masking | TokenSampler, learned: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting differs from its default and the masking does not take it."""
    takes = () if isinstance(masking, TokenSampler) else settings_of(masking)
    given = [name for name, value in learned.items() if name not in takes and value != _LEARNED[name]]
    if given:
        told = "the sampler given has its own" if isinstance(masking, TokenSampler) else f"masking={masking!r} has none"
        values = ", ".join(f"{name}={learned[name]!r}" for name in given)
        takers = [name for name in MASKINGS if set(given) <= set(settings_of(name))]
        raise ValueError(f"{values}: only masking={' or '.join(map(repr, takers))} takes it; {told}. Leave it out.")


def _check_fits(
    sampler: TokenSampler, embed_dim: int, grid_size: GridSize, mask_ratio: float | None, num_masks: int
) -> None:
    """Raises ValueError if a given sampler is for other tokens, another ratio or another number of masks."""
    if mask_ratio not in (None, sampler.mask_ratio):
        raise ValueError(
            f"mask_ratio={mask_ratio}, but the sampler given has {sampler.mask_ratio}. Set mask_ratio of the sampler."
        )
    if num_masks not in (1, sampler.num_masks):
        raise ValueError(
            f"num_masks={num_masks}, but the sampler given has {sampler.num_masks}. Set num_masks of the sampler."
        )
    if sampler.grid_size != grid_size:
        raise ValueError(
            f"the sampler's grid_size is {sampler.grid_size}, the model's {grid_size}. Build both with one grid."
        )
    if isinstance(sampler, ScoredTokenSampler) and sampler.embed_dim != embed_dim:
        raise ValueError(
            f"the sampler's embed_dim is {sampler.embed_dim}, expected {embed_dim}: the embed_dim of the model, or "
            "with sample_from='pixels' the values of a patch shrunk to 4 x 4. Build the sampler with that."
        )
