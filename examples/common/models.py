"""Models by name, and weights files that state the model's sizes and recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from adamae_sampler.models import AdaMAE, VideoClassifier
from common.settings import EncoderSettings
from common.tensor_files import write_tensors

AUTOENCODERS, CLASSIFIERS = "pretrain_adamae*", "adamae_vit*"  # families of models in timm's registry


def create_model(name: str, family: str, **arguments: Any) -> Any:
    """A model of timm's registry.

    Args:
        name: name of the model.
        family: pattern of the allowed names, as in `timm.list_models`.
        arguments: keyword arguments of the model; None keeps the default.

    Raises:
        ValueError: no model of the family has this name.
    """
    known = timm.list_models(family)
    if name not in known:
        raise ValueError(f"no model {name!r}; there are {', '.join(known)}.")
    return timm.create_model(name, **arguments)


def save_weights(model: AdaMAE | VideoClassifier, path: Path, recipe: EncoderSettings) -> None:
    """Writes a model's weights with its sizes and the recipe that trained it."""
    metadata = {"model": json.dumps(_sizes(model)), "recipe": json.dumps(recipe.plain())}
    write_tensors(path, model.state_dict(), metadata)


def _sizes(model: AdaMAE | VideoClassifier) -> dict[str, Any]:
    """The model's keyword arguments."""
    _, frames, height, width = model.size.video
    sizes = {
        "img_size": [height, width],
        "num_frames": frames,
        "patch_size": model.size.patch[0],
        "tubelet_size": model.size.tubelet,
        **_transformer("", model.encoder.blocks),
    }
    if isinstance(model, AdaMAE):
        return sizes | _transformer("decoder_", model.decoder.blocks)
    return sizes | {"num_classes": model.num_classes}


def _transformer(prefix: str, blocks: Any) -> dict[str, int]:
    attention = blocks[0].attn
    return {
        f"{prefix}embed_dim": attention.proj.out_features,
        f"{prefix}depth": len(blocks),
        f"{prefix}num_heads": attention.num_heads,
    }
