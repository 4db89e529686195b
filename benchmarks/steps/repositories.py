"""Research code imported from checkouts, and the pre-training models of the official repositories among it.

Nothing of it is copied here; the official repositories are under CC BY-NC. Their imports take names such as `models`
and change `sys.path`, so they are only made in a process of their own.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.models.vision_transformer
from torch import nn

ADAMAE, VIDEOMAE = "AdaMAE repository", "VideoMAE repository"
_FILES = {ADAMAE: "models/pretrain/vit.py", VIDEOMAE: "modeling_pretrain.py"}
_CLASS = "PretrainVisionTransformer"


def repository_name(path: Path) -> str:
    """Which repository is checked out at `path`.

    Raises:
        FileNotFoundError: neither of them.
    """
    for name, file in _FILES.items():
        if (path / file).is_file():
            return name
    expected = " or ".join(f"{file} ({name})" for name, file in _FILES.items())
    raise FileNotFoundError(
        f"{path} holds no official code: expected {expected}. Check out https://github.com/wgcban/adamae or "
        "https://github.com/MCG-NJU/VideoMAE there."
    )


def repository_model(path: Path, img_size: int, depth: int, mask_ratio: float) -> nn.Module:
    """Its ViT-B for 16 frames, with the decoder of 4 blocks that both train with on SSv2.

    AdaMAE's gives prediction [B, M, P], probs [B, N] and mask [B, N] of a video, VideoMAE's a prediction of a video
    and a mask.

    Raises:
        FileNotFoundError: `path` holds neither repository.
        ImportError: its code cannot be imported, or lacks the model.
    """
    name = repository_name(path)
    module = import_from(path.resolve(), _FILES[name].removesuffix(".py").replace("/", "."))
    if not hasattr(module, _CLASS):
        raise ImportError(f"{path / _FILES[name]} has no class {_CLASS}, which is what {name} trains.")
    model: nn.Module = getattr(module, _CLASS)(
        img_size=img_size,
        encoder_depth=depth,
        decoder_embed_dim=384,
        decoder_depth=4,
        decoder_num_heads=6,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **({"mask_ratio": mask_ratio} if name == ADAMAE else {}),
    )
    return model


def import_from(path: Path, module: str) -> Any:
    """A module of the checkout in a folder, which was written for older timm and NumPy.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: the code cannot be imported.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no checkout in {path}.")
    block = timm.models.vision_transformer.Block

    def block_of_old(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
        return block(*args, **kwargs)

    if not hasattr(np, "float"):
        setattr(np, "float", float)  # noqa: B010  # mae asks for it, NumPy has dropped it
    sys.path.insert(0, str(path))
    try:
        with mock.patch.object(timm.models.vision_transformer, "Block", block_of_old):
            return importlib.import_module(module)
    finally:
        sys.path.remove(str(path))
