"""Atomic writes of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from common.atomic_files import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    with replacing(path) as aside:
        try:
            safetensors.torch.save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"format": "pt", **metadata}
            )
        except SafetensorError as error:  # safetensors raises this for any failed write
            raise OSError(str(error)) from error
