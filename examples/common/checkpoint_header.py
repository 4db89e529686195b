"""What a weights file or folder states of its model and its run. It is read without torch.

Files of these scripts are safetensors whose metadata has sizes and recipe; Hugging Face folders have a config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors

from common.settings import EncoderSettings


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
        with safetensors.safe_open(path, "np") as file:
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
