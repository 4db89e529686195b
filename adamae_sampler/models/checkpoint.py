"""Loading weights: the known formats, and how much of a model a file must cover.

A format recognises a file and renames its keys. To add a format, add an entry to FORMATS. Only tensors and plain
containers are unpickled.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from adamae_sampler.models import huggingface
from adamae_sampler.networks import current_name


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_checkpoint`; print it.

    Attributes:
        format: name of the recognised format.
        matched: parameters of the model that were loaded.
        missing: parameters of the model that the file lacks; they keep their values.
        unused: keys of the file that the model lacks.
        left: keys of the file outside of `only`, which were not asked for.
    """

    format: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.format} checkpoint: {len(self.matched)} tensors loaded"]
        lines += [f"  not in the file, left as they were: {_summary(self.missing)}"] if self.missing else []
        lines += [f"  in the file, not in the model: {_summary(self.unused)}"] if self.unused else []
        lines += [f"  not needed, and left in the file: {_summary(self.left)}"] if self.left else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    Attributes:
        name: name in reports and errors.
        marker: a regular expression that matches at least one key of such a file.
        renames: (pattern, replacement) pairs, applied in order to every key.
        convert: a function from the file's weights to ours, where renaming is not enough.
        lacks: prefixes of the model's keys that files of this format never have.
        hint: a sentence for the error about missing parameters.
    """

    name: str
    marker: str
    renames: Sequence[tuple[str, str]] = field(default_factory=tuple)
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    lacks: tuple[str, ...] = ()
    hint: str = ""


FORMATS = (
    # First, since a patched model's file has a sampler too.
    Format(
        "Hugging Face VideoMAE",
        huggingface.MARKER,
        convert=huggingface.from_huggingface,
        lacks=("sampler.",),
        hint="(A model made with use_mean_pooling=True has no encoder.norm.) ",
    ),
    Format("adamae_sampler", r"^sampler\."),
    Format(
        "official AdaMAE",
        r"^encoder\.get_token_probs\.",
        renames=(
            (r"^encoder\.pos_embed_probs$", "sampler.network.pos_embed"),
            (r"^encoder\.get_token_probs\.0\.", "sampler.network.blocks.0."),
            (r"^encoder\.get_token_probs\.1\.", "sampler.network.head."),
        ),
    ),
    # Also our own model with a fixed sampler, which has no parameters, and our classifier. Their keys are the same.
    Format("VideoMAE (no sampler)", r"^encoder\.blocks\..*\.q_bias$", lacks=("sampler.",)),
    Format(
        "fine-tuned VideoMAE", r"^blocks\..*\.q_bias$", renames=((r"^(?=(patch_embed|blocks|norm)\.)", "encoder."),)
    ),
)

_CONTAINERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which files keep the weights
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "_fsdp_wrapped_module.",
)  # prefixes that DDP, torch.compile and FSDP add to keys


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    only: str = "",
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Loads weights into a reference model: official AdaMAE's, VideoMAE's, Hugging Face VideoMAE's or our own.

    Everything is checked before anything is written, so on an error the model does not change. A file may have no
    sampler (VideoMAE's, Hugging Face's, or ours with a fixed mask). An adaptive model then keeps its fresh sampler, and
    the report says so. No file states the numbers of heads; a file without a sampler does not state the grid either.
    Build the model with the checkpoint's heads and grid.

    Args:
        model: `AdaMAE` or `VideoClassifier`, bare or wrapped (DDP, torch.compile).
        checkpoint: a state dict; or a path to a .safetensors file, to a file of torch.save, or to a folder with
            model.safetensors.
        only: a prefix of the model's parameters; the others are neither loaded nor needed. "encoder." starts a
            classifier from a pre-trained file, or from a classifier of other classes.
        allow_missing: prefixes of the model's parameters that the file need not have, such as "sampler." or
            "decoder.".

    Returns:
        LoadReport: the matched, missing and unused names.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: the weights are not all tensors.
        ValueError: the file is damaged or holds foreign objects, the format is unknown, a shape differs, or a
            parameter of the model is missing.
    """
    tensors = _strip_wrappers(
        _find_weights(_read(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint)
    )
    own = {_strip(name): tensor for name, tensor in model.state_dict().items() if _strip(name).startswith(only)}
    if not own:
        raise ValueError(
            f"only={only!r} matches no parameter of the model, which has {_summary(list(model.state_dict()))}."
        )
    file_format = _recognise(tensors, own)
    weights = file_format.convert({_rename(name, file_format): tensor for name, tensor in tensors.items()})

    wrong_shape = [
        f"{name} is {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong_shape:
        raise ValueError(
            f"the {file_format.name} checkpoint is of another architecture; {len(wrong_shape)} shapes differ:\n  "
            + "\n  ".join(wrong_shape[:8])
            + "\nBuild the model with the checkpoint's img_size, num_frames, patch_size, widths and num_classes, and a "
            "sampler with its score_network and sample_from."
        )
    missing = tuple(name for name in own if name not in weights)
    unused = tuple(name for name in weights if name not in own)
    needed = [name for name in missing if not name.startswith((*file_format.lacks, *allow_missing))]
    if needed:
        lacks_decoder = any(name.startswith("decoder.") for name in needed)
        no_decoder = lacks_decoder and not any(name.startswith("decoder.") for name in weights)
        hint = file_format.hint + ("It has no decoder: it is an encoder alone, or a classifier. " if no_decoder else "")
        raise ValueError(
            f"the {file_format.name} checkpoint lacks {len(needed)} of the model's {len(own)} parameters: "
            f"{_summary(needed)}. In the file, not in the model: {_summary(unused) if unused else 'nothing'}. "
            f"{hint}Build the model with the checkpoint's depth, or list in allow_missing the prefixes of parameters "
            "that may keep their values."
        )
    parts = {name.partition(".")[0] for name in own} & {"encoder", "decoder"}  # a classifier has no decoder
    if deeper := [name for name in unused if name.startswith(tuple(f"{part}.blocks." for part in parts))]:
        raise ValueError(
            f"the {file_format.name} checkpoint is deeper than the model: it also has {_summary(deeper)}. "
            "Build the model with the checkpoint's depth and decoder_depth."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights:
                tensor.copy_(weights[name])
    matched = tuple(name for name in own if name in weights)
    left = tuple(name for name in unused if not name.startswith(only))
    return LoadReport(file_format.name, matched, missing, tuple(name for name in unused if name not in left), left)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").is_file():  # as save_pretrained writes it
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Training scripts of VideoMAE's family save their arguments beside the weights; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise many types of errors for a damaged file
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds objects other than tensors and plain "
            "containers, which are never unpickled. If you trust the file, save its weights alone, as in "
            f"torch.save({{'model': checkpoint['model']}}, path). ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors.")
    return loaded


def _find_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    for container in _CONTAINERS:
        inner = checkpoint.get(container)
        if isinstance(inner, Mapping):
            return _find_weights(inner)
    other = {name: type(value).__name__ for name, value in checkpoint.items() if not isinstance(value, Tensor)}
    if other:
        raise TypeError(
            f"the checkpoint holds {_summary([f'{name} ({kind})' for name, kind in other.items()])} where tensors were "
            f"expected. Give a state dict, or a file with a state dict under one of {_CONTAINERS}."
        )
    return dict(checkpoint)


def _strip(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def _strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_strip(name): tensor for name, tensor in tensors.items()}


def _recognise(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Format:
    for file_format in FORMATS:
        if any(re.search(file_format.marker, name) for name in tensors):
            return file_format
    raise ValueError(
        f"the checkpoint has keys such as {_summary(list(tensors))}, which is none of the formats known "
        f"({', '.join(each.name for each in FORMATS)}). Rename its keys to the model's, such as {_summary(list(own))}."
    )


def _rename(name: str, file_format: Format) -> str:
    for pattern, replacement in file_format.renames:
        name = re.sub(pattern, replacement, name)
    model, network, layer = name.partition("sampler.network.")
    return model + network + current_name(layer)


def _summary(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown}, ... ({len(names)} in all)"
