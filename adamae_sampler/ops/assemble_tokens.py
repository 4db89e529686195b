"""assemble_tokens: the decoder's input, encoded visible tokens and mask tokens with their positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.checks import check_device, check_indices, check_pos, check_tokens
from adamae_sampler.ops.gather_tokens import select_rows

Order = Literal["concat", "restore"]


def _assemble_tokens_reference(
    visible: Tensor, mask_token: Tensor, pos: Tensor, sample: MaskSample, order: Order
) -> Tensor:
    batch, num_visible, width = visible.shape
    token_idx = torch.cat([sample.visible_idx, sample.masked_idx], dim=1)  # [B, N], the order of "concat"
    fill = mask_token.to(visible.dtype).reshape(1, 1, width).expand(batch, token_idx.shape[1] - num_visible, width)
    concatenated = torch.cat([visible, fill], dim=1)  # [B, N, D]
    if order == "concat":
        return concatenated + select_rows(pos, token_idx).to(visible.dtype)
    return select_rows(concatenated, token_idx.argsort(dim=1)) + pos.to(visible.dtype)


def assemble_tokens(
    visible: Tensor, mask_token: Tensor, pos: Tensor, sample: MaskSample, order: Order = "concat"
) -> Tensor:
    """(visible + pos[visible_idx]) ++ (mask_token + pos[masked_idx]) (Algorithm 2).

    Args:
        visible: [B, K, D] encoded visible tokens, in the order of `sample.visible_idx`.
        mask_token: a tensor of D values, such as [D] or [1, 1, D]; the learned stand-in for a masked token.
        pos: [N, D], [1, N, D] or [B, N, D] position embedding of the decoder.
        sample: the mask.
        order: "concat" puts the K visible tokens first and the M masked ones after them, as VideoMAE's and
            AdaMAE's decoders take them; "restore" puts every token back in its place, as MAE's does.

    Returns:
        [B, N, D] in the dtype of `visible`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or order; an index out of range (checked on CPU in
            eager mode only).
    """
    check_tokens("visible", visible)
    batch, num_visible, width = visible.shape
    num_tokens = sample.mask.shape[1]
    if num_visible != sample.visible_idx.shape[1]:
        raise ValueError(
            f"visible holds {num_visible} tokens, the sample leaves {sample.visible_idx.shape[1]} visible."
        )
    check_indices("sample.visible_idx", sample.visible_idx, batch, num_tokens, visible.device)
    check_indices("sample.masked_idx", sample.masked_idx, batch, num_tokens, visible.device)
    if mask_token.numel() != width:
        raise ValueError(
            f"mask_token has shape {tuple(mask_token.shape)}, expected {width} values, one row of visible."
        )
    check_device("mask_token", mask_token, visible.device)
    check_pos(pos, batch, num_tokens, width, visible.device)
    if order not in ("concat", "restore"):
        raise ValueError(f"order={order!r}, expected 'concat' (visible first) or 'restore' (every token in its place).")
    return _assemble_tokens_reference(visible, mask_token, pos, sample, order)
