"""Named settings of the pre-training models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from adamae_sampler.sampler import settings_of

Preset = Literal["exact", "fast"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"score_network": "mha", "sample_from": "tokens", "decode_ratio": 1.0},
    "fast": {"score_network": "pooled", "sample_from": "pixels", "decode_ratio": 0.5},
}
"""Arguments of `AdaMAE` for each preset: "exact" is the method of the paper, "fast" costs less."""


def with_preset(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model, with `preset` replaced by its settings.

    Args:
        arguments: arguments of `AdaMAE`, and `preset`. Without `preset` they do not change: the defaults of `AdaMAE`
            are the settings of "exact".

    Raises:
        ValueError: the preset is unknown, or another argument contradicts it.
    """
    arguments = dict(arguments)
    preset = arguments.pop("preset", None)
    if preset is None:
        return arguments
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, expected one of {', '.join(map(repr, PRESETS))}.")
    settings = PRESETS[preset]
    for name, value in settings.items():
        if name in arguments and arguments[name] != value:
            raise ValueError(
                f"{name}={arguments[name]!r} contradicts preset={preset!r}, which sets {name}={value!r}. Leave one out."
            )
    masking = arguments.get("masking", "adaptive")
    if preset != "exact" and not (isinstance(masking, str) and "score_network" in settings_of(masking)):
        raise ValueError(
            f"masking={masking!r} contradicts preset={preset!r}, which sets score_network="
            f"{settings['score_network']!r}: only masking='adaptive' or 'hard' takes a score network. Leave the preset "
            "out, and pass its sample_from and decode_ratio yourself."
        )
    return {**arguments, **settings}
