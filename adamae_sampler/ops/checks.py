"""What several ops share: checks of their input, none of which reads a value from a device, and precision."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import free_to_read


def check_floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is floating point."""
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point tensor.")


def check_tokens(name: str, x: Tensor) -> None:
    """Raises unless x is a floating-point [B, N, D] tensor."""
    check_floating(name, x)
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, N, D]: clips, tokens, width.")


def check_indices(name: str, idx: Tensor, batch: int, num_tokens: int, device: torch.device) -> None:
    """Raises unless idx is int64 [B, K] on the device given, and, on CPU in eager mode, within 0..N-1.

    On other devices the range is not checked, since that would make the host wait; what `draw_mask` and
    `MaskSample.from_mask` return is always within it.
    """
    if idx.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {idx.dtype}, expected torch.int64; use {name}.long().")
    if idx.ndim != 2 or idx.shape[0] != batch:
        raise ValueError(f"{name} has shape {tuple(idx.shape)}, expected [{batch}, K]: a row for each clip.")
    check_device(name, idx, device)
    if free_to_read(idx) and idx.numel():
        low, high = (int(bound) for bound in idx.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} holds {low}..{high}, expected indices within 0..{num_tokens - 1}.")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises ValueError unless x is on the device given."""
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the other tensors on {device}; move one to the other.")


def check_pos(pos: Tensor, batch: int, num_tokens: int, width: int, device: torch.device) -> None:
    """Raises unless pos is floating point, [N, D], [1, N, D] or [B, N, D], and on the device given."""
    check_floating("pos", pos)
    check_device("pos", pos, device)
    shape = tuple(pos.shape)
    if shape[-2:] != (num_tokens, width) or pos.ndim not in (2, 3) or (pos.ndim == 3 and shape[0] not in (1, batch)):
        raise ValueError(
            f"pos has shape {shape}, expected [{num_tokens}, {width}], [1, {num_tokens}, {width}] or "
            f"[{batch}, {num_tokens}, {width}]: one position embedding for each token."
        )


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is if it is fp64 already: probabilities and losses are never computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
