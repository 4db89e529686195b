"""Models by name, and weights files: safetensors whose metadata has the model's sizes and recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import timm

from adamae_sampler.models import AdaMAE, VideoClassifier
from common.atomic_files import write_tensors
from common.settings import EncoderSettings

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


def stated_sizes(checkpoint: str) -> dict[str, Any]:
    """The keyword arguments of the model that a checkpoint states.

    Files of these scripts and Hugging Face VideoMAE folders state them; classifiers state `num_classes` too. Other
    files state none, and the user gives the sizes.
    """
    path = Path(checkpoint)
    if checkpoint and (path / "config.json").is_file():
        return _huggingface_sizes(json.loads((path / "config.json").read_text(encoding="utf-8")))
    sizes = _metadata(path).get("model") if checkpoint else None
    found: dict[str, Any] = json.loads(sizes) if sizes else {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def size_note(checkpoint: str, settings: EncoderSettings) -> str:
    """A note if the clips differ in size from the checkpoint's, else an empty string. Weights fit clips of any size."""
    sizes = stated_sizes(checkpoint)
    other = [name for name in ("img_size", "num_frames") if name in sizes and sizes[name] != getattr(settings, name)]
    notes = [f"{name} {sizes[name]} there, {getattr(settings, name)} here" for name in other]
    return (
        f"\n  clips differ from the file's: {', '.join(notes)}; position embeddings are computed anew" if notes else ""
    )


def ends_with_norm(checkpoint: str) -> bool:
    """Whether the encoder of a checkpoint ends with a LayerNorm.

    Encoders of classifiers and of Hugging Face models with mean pooling (the default) have none. All other encoders
    count as having one.
    """
    config = Path(checkpoint) / "config.json"
    if config.is_file():
        return not json.loads(config.read_text(encoding="utf-8")).get("use_mean_pooling", True)
    return "num_classes" not in stated_sizes(checkpoint)


def stated_recipe(checkpoint: str) -> dict[str, Any]:
    """The settings of the run that wrote a file of these scripts; empty for other files."""
    recipe = _metadata(Path(checkpoint)).get("recipe") if checkpoint else None
    found: dict[str, Any] = json.loads(recipe) if recipe else {}
    return found


def _metadata(path: Path) -> dict[str, str]:
    if path.is_dir():  # load_checkpoint takes folders too
        path = path / "model.safetensors"
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: it cannot be read as safetensors ({error}).") from error


def _huggingface_sizes(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != "videomae":
        raise ValueError(f"config.json of the checkpoint: model_type is {config.get('model_type')}, expected videomae.")
    size, defaults = config.get("image_size", 224), {"num_frames": 16, "patch_size": 16, "tubelet_size": 2}
    classifier = "VideoMAEForVideoClassification" in config.get("architectures", ())
    labels = config.get("id2label") or range(config.get("num_labels", 2))
    return {
        **({"num_classes": len(labels)} if classifier else {}),
        "img_size": tuple(size) if isinstance(size, list) else (size, size),
        **{name: config.get(name, value) for name, value in defaults.items()},
        "embed_dim": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "decoder_embed_dim": config.get("decoder_hidden_size", 384),
        "decoder_depth": config.get("decoder_num_hidden_layers", 4),
        "decoder_num_heads": config.get("decoder_num_attention_heads", 6),
    }
