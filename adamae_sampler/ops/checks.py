"""What several ops share: checks of their input, none of which reads a value from a device, and precision."""

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
    """Raises unless idx is int64 [B, K] on the device given; or, where `several` masks of a clip may be, [B R, K]."""
    check_tensor(name, idx)
    if idx.dtype == torch.bool:
        raise TypeError(
            f"{name} is a boolean mask, expected int64 indices: visible_idx or masked_idx of a sample, such as "
            "MaskSample.from_mask(mask, num_visible) makes of a mask."
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
    """As `check_index_shape`; and raises, on CPU in eager mode, unless indices are distinct within 0..N-1 in each row.

    On other devices the values are not checked, since that would make the host wait; what `draw_mask` and
    `MaskSample.from_mask` return is always right.
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
                "each token once at most."
            )


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raises unless x is a tensor on the device given."""
    check_tensor(name, x)
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


def check_video(video: Tensor, patches: PatchFormat) -> int:
    """N, the tokens of a clip. Raises unless the video is [B, C, T, H, W], uint8 or floating point, and patches divide
    it."""
    check_tensor("video", video)
    tokens_t, tokens_h, tokens_w = patches.grid(video.shape)
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise TypeError(f"video has dtype {video.dtype}, expected uint8 pixels or floating point.")
    return tokens_t * tokens_h * tokens_w


def check_channels(video: Tensor, patches: PatchFormat) -> None:
    """Raises unless mean and std, if the format has them, are as many as the channels of the video."""
    if patches.mean is not None and patches.std is not None and len(patches.mean) != video.shape[1]:
        raise ValueError(
            f"mean has {len(patches.mean)} values, std {len(patches.std)}, the video {video.shape[1]} channels."
        )


def check_target(video: Tensor, patches: PatchFormat) -> int:
    """N, the tokens of a clip. As `check_video`; and raises if the format's mean and std do not fit the video."""
    num_tokens = check_video(video, patches)
    if patches.mean is not None:
        if video.dtype == torch.uint8:
            raise ValueError("video is uint8, which is pixels already: leave mean and std out.")
        check_channels(video, patches)
    return num_tokens
