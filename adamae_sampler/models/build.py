"""Builds the models for timm's registry."""

from __future__ import annotations

from typing import Any, TypeVar

from timm.models import build_model_with_cfg
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def build_variant(
    kind: type[Model], variant: str, pretrained: bool, kwargs: dict[str, Any], num_classes: int = -1, **size: Any
) -> Model:
    """A model of `kind` with the arguments of its variant. The caller's arguments override these.

    Raises:
        ValueError: `pretrained` is True; there are no weights to download.
    """
    if pretrained:
        raise ValueError(
            f"{variant} has no weights to download. Create it with pretrained=False, then call "
            "adamae_sampler.models.load_checkpoint(model, path)."
        )
    pretrained_cfg = {"architecture": variant, "num_classes": num_classes, "input_size": None}
    kwargs = {**kwargs, "pretrained_cfg": kwargs.get("pretrained_cfg") or pretrained_cfg}
    model: Model = build_model_with_cfg(kind, variant, False, **{**size, **kwargs})
    return model
