"""Saves a pre-trained encoder for other code to fine-tune."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from adamae_sampler.models.adamae import AdaMAE
from adamae_sampler.models.huggingface import configuration, to_huggingface


def save_encoder(
    model: AdaMAE, path: str | os.PathLike[str], format: Literal["huggingface", "videomae"] = "huggingface"
) -> None:
    """Writes the encoder in the format of other code, which gets the same outputs from it.

    Args:
        model: `AdaMAE`, not wrapped.
        path: for "huggingface" a folder, which `VideoMAEModel.from_pretrained` and
            `VideoMAEForVideoClassification.from_pretrained` load; for "videomae" a file, which VideoMAE's
            `run_class_finetuning.py --finetune` loads.
        format: "huggingface" or "videomae".

    Raises:
        TypeError: the model is not an `AdaMAE`.
        ValueError: the format is unknown, or the path of a folder has the suffix of a file.
        FileExistsError: the path exists already.
    """
    if not isinstance(model, AdaMAE):
        inner = " (pass model.module, without its wrapper)" if hasattr(model, "module") else ""
        raise TypeError(f"model is {type(model).__name__}, expected AdaMAE{inner}.")
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; delete it, or choose another path.")
    if format == "huggingface" and path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise ValueError(f"{path} is named like a file, but 'huggingface' writes a folder. Leave the suffix out.")
    if format == "videomae":
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.encoder.state_dict()}, path)
    elif format == "huggingface":
        path.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in to_huggingface(model).items()}
        safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(configuration(model), indent=2) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"format={format!r}, expected 'huggingface' or 'videomae'.")
