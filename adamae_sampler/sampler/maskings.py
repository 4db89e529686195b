"""The samplers by name, for models and scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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

# Settings that only some maskings take: the default, and the argument of the sampler.
_LEARNED: Mapping[str, tuple[Any, str]] = {
    "score_network": ("mha", "network"),
    "temperature": (1.0, "temperature"),
    "exploration": (0.0, "exploration"),
}


def settings_of(masking: str) -> tuple[str, ...]:
    """Names of the settings that this masking takes, of `score_network`, `temperature` and `exploration`."""
    return {"adaptive": tuple(_LEARNED), "hard": ("score_network",)}.get(masking, ())


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
        learned: values of `score_network`, `temperature` and `exploration`.

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
    settings = {_LEARNED[name][1]: learned[name] for name in settings_of(masking)}
    settings |= {"source": "pixels"} if kind is MotionTokenSampler else {}
    sampler: TokenSampler = kind(**width, grid_size=grid_size, mask_ratio=mask_ratio, num_masks=num_masks, **settings)
    return sampler


def _check_settings(masking: Masking | TokenSampler, learned: Mapping[str, Any]) -> None:
    """Raises ValueError if a setting differs from its default and the masking does not take it."""
    takes = () if isinstance(masking, TokenSampler) else settings_of(masking)
    given = [name for name, value in learned.items() if name not in takes and value != _LEARNED[name][0]]
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
