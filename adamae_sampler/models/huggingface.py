"""Converts weights between the reference model and Hugging Face's VideoMAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adamae_sampler.models.adamae import AdaMAE

# Some releases of transformers 5 have one. It adds the same to all scores of a query, so softmax takes no notice of it.
_KEY_BIAS = "attention.attention.key.bias"
MARKER = r"(^|\.)encoder\.layer\.\d+\.attention\.attention\.query\.weight$"

# (their name, our name), within a block and outside of blocks. The biases are query.bias and value.bias in
# transformers 5; they are q_bias and v_bias in transformers 4 and its files.
_BLOCK = (
    ("attention.attention.query.weight", "attn.q.weight"),
    ("attention.attention.key.weight", "attn.k.weight"),
    ("attention.attention.value.weight", "attn.v.weight"),
    ("attention.attention.q_bias", "attn.q_bias"),
    ("attention.attention.v_bias", "attn.v_bias"),
    ("attention.attention.query.bias", "attn.q_bias"),
    ("attention.attention.value.bias", "attn.v_bias"),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
)
_OUTSIDE = (
    ("embeddings.patch_embeddings.projection.", "encoder.patch_embed.proj."),
    ("layernorm.", "encoder.norm."),
    ("classifier.", "head."),
)


def from_huggingface(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of VideoMAEModel, VideoMAEForPreTraining or VideoMAEForVideoClassification under our names."""
    ours = {_our_name(name): tensor for name, tensor in weights.items() if not name.endswith(_KEY_BIAS)}
    for query in [name for name in ours if name.endswith(".attn.q.weight")]:
        block = query.removesuffix("q.weight")
        parts = [ours.pop(f"{block}{each}.weight") for each in "qkv" if f"{block}{each}.weight" in ours]
        ours[f"{block}qkv.weight"] = torch.cat(parts)
    return ours


def to_huggingface(model: AdaMAE) -> dict[str, Tensor]:
    """The encoder's weights under VideoMAEModel's names, in the layout that every version of transformers loads."""
    theirs: dict[str, Tensor] = {}
    names = {ours: name for name, ours in reversed(_BLOCK + _OUTSIDE)}
    for name, tensor in model.encoder.state_dict(prefix="encoder.").items():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        if block is None:
            outside = next(ours for _, ours in _OUTSIDE if name.startswith(ours))
            theirs[name.replace(outside, names[outside])] = tensor
            continue
        prefix, rest = f"encoder.layer.{block[1]}.", name.removeprefix(block[0])
        if rest == "attn.qkv.weight":
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                theirs[prefix + names[f"attn.{part}.weight"]] = weight.contiguous()
            continue
        inside = next(ours for _, ours in _BLOCK if rest.startswith(ours))
        theirs[prefix + rest.replace(inside, names[inside])] = tensor
    return theirs


def configuration(model: AdaMAE) -> dict[str, Any]:
    """The config.json of VideoMAEModel for the encoder."""
    channels, frames, height, width = model.size.video
    block: Any = model.encoder.blocks[0]
    patch = model.size.patch
    return {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": channels,
        "num_frames": frames,
        "tubelet_size": model.size.tubelet,
        "hidden_size": model.encoder.pos_embed.shape[-1],
        "num_hidden_layers": len(model.encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": True,
        "use_mean_pooling": False,
    }


def _our_name(name: str) -> str:
    name = name.removeprefix("videomae.")
    block = re.match(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.", name)
    if block is None:
        return next((name.replace(theirs, ours, 1) for theirs, ours in _OUTSIDE if name.startswith(theirs)), name)
    prefix, rest = f"{block[1].split('.')[0]}.blocks.{block[2]}.", name.removeprefix(block[0])
    return prefix + next((rest.replace(theirs, ours, 1) for theirs, ours in _BLOCK if rest.startswith(theirs)), rest)
