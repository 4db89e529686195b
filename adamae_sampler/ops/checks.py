"""Checks of input that several ops share, and their precision. No check reads a value from a device."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import free_to_read
from adamae_sampler.ops.patch_format import PatchFormat


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor; use torch.as_tensor({name}) for an array.")


def check_floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is a floating-point tensor."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point tensor; use {name}.float().")


def check_tokens(name: str, x: Tensor) -> None:
    """Raises unless x is a floating-point [B, N, D] tensor."""
    check_floating(name, x)
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [B, N, D]: clips, tokens, width.")


def check_index_shape(name: str, idx: Tensor, batch: int, device: torch.device, several: bool = False) -> None:
    """Raises unless idx is int64 [B, K] on the given device. With `several`, [B R, K] passes too."""
    check_tensor(name, idx)
    if idx.dtype == torch.bool:
        raise TypeError(
            f"{name} is a boolean mask, expected int64 indices. Convert it with MaskSample.from_mask(mask, "
            "num_visible), then pass visible_idx or masked_idx."
        )
    if idx.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {idx.dtype}, expected torch.int64; use {name}.long().")
    if idx.ndim != 2 or (idx.shape[0] == 0 or idx.shape[0] % batch if several and batch else idx.shape[0] != batch):
        rows = f"a row for each clip, or R for each: [{batch} R, K]" if several else "a row for each clip"
        raise ValueError(f"{name} has shape {tuple(idx.shape)}, expected [{batch}, K]: {rows}.")
    check_device(name, idx, device)


def check_indices(
    name: str, idx: Tensor, batch: int, num_tokens: int, device: torch.device, several: bool = False
) -> None:
    """Checks as `check_index_shape`; on CPU in eager mode also that each row has distinct indices within 0..N-1.

    Elsewhere the values are not checked, since that would make the host wait. Indices from `draw_mask` and
    `MaskSample.from_mask` are always valid.
    """
    check_index_shape(name, idx, batch, device, several)
    if free_to_read(idx) and idx.numel():
        low, high = (int(bound) for bound in idx.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} holds {low}..{high}, expected indices within 0..{num_tokens - 1}.")
        named = torch.zeros(idx.shape[0], num_tokens, dtype=torch.bool).scatter_(1, idx, True).sum(1)
        if (named != idx.shape[1]).any():
            row = int((named != idx.shape[1]).nonzero()[0])
            raise ValueError(
                f"{name} names {int(named[row])} different tokens with {idx.shape[1]} indices in row {row}, expected "
                "each token at most once."
            )


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises unless x is a tensor on the given device."""
    check_tensor(name, x)
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, expected {device}, as the other tensors; use {name}.to(...).")


def check_pos(pos: Tensor, batch: int, num_tokens: int, width: int, device: torch.device) -> None:
    """Raises unless pos is floating point, [N, D], [1, N, D] or [B, N, D], and on the given device."""
    check_floating("pos", pos)
    check_device("pos", pos, device)
    shape = tuple(pos.shape)
    if shape[-2:] != (num_tokens, width) or pos.ndim not in (2, 3) or (pos.ndim == 3 and shape[0] not in (1, batch)):
        raise ValueError(
            f"pos has shape {shape}, expected [{num_tokens}, {width}], [1, {num_tokens}, {width}] or "
            f"[{batch}, {num_tokens}, {width}]: one position embedding for each token."
        )


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays fp64. Probabilities and losses are never computed in lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_video(video: Tensor, patches: PatchFormat) -> int:
    """Returns N, the tokens of a clip. Raises unless the video is [B, C, T, H, W], uint8 or floating point, and patches
    divide it."""
    check_tensor("video", video)
    tokens_t, tokens_h, tokens_w = patches.grid(video.shape)
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video has dtype {video.dtype}, expected uint8 pixels or floating point.")
    return tokens_t * tokens_h * tokens_w


def check_channels(video: Tensor, patches: PatchFormat) -> None:
    """Raises unless mean and std, if given, have one value for each channel of the video."""
    if patches.mean is not None and patches.std is not None and len(patches.mean) != video.shape[1]:
        raise ValueError(
            f"mean has {len(patches.mean)} values, std {len(patches.std)}, the video {video.shape[1]} channels. Give "
            "one mean and one std for each channel."
        )


def check_target(video: Tensor, patches: PatchFormat) -> int:
    """Returns N, as `check_video`. Also raises if mean and std do not fit the video."""
    num_tokens = check_video(video, patches)
    if patches.mean is not None:
        if video.dtype == torch.uint8:
            raise ValueError("video is uint8, so its values are pixels already. Leave mean and std out.")
        check_channels(video, patches)
    return num_tokens
