"""gather_tokens: the visible tokens of each clip, with their position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.ops.checks import check_indices, check_pos, check_tokens


def _gather_tokens_reference(x: Tensor, idx: Tensor, pos: Tensor | None) -> Tensor:
    gathered = select_rows(x, idx)
    return gathered if pos is None else gathered + select_rows(pos, idx).to(gathered.dtype)


def select_rows(x: Tensor, idx: Tensor) -> Tensor:
    """x [B, N, D], [1, N, D] or [N, D], idx [B, K] -> [B, K, D], as whole rows of a flat table.

    `index_select` copies rows; `torch.gather` with an expanded index reads one index for every element.
    """
    num_tokens, width = x.shape[-2:]
    if x.ndim == 3 and x.shape[0] == idx.shape[0]:
        idx_flat = idx + torch.arange(x.shape[0], device=idx.device)[:, None] * num_tokens  # [B, K] into [B N]
    else:
        idx_flat = idx  # one table for all clips
    return x.reshape(-1, width).index_select(0, idx_flat.reshape(-1)).view(*idx.shape, width)


def gather_tokens(x: Tensor, idx: Tensor, pos: Tensor | None = None) -> Tensor:
    """x[b, idx[b]] + pos[idx[b]] for every clip b.

    Args:
        x: [B, N, D] tokens.
        idx: [B, K] int64, the tokens to take; distinct within a row.
        pos: [N, D], [1, N, D] or [B, N, D] position embedding; added after the gather, so that only K of N
            rows are touched. Cast to the tokens' dtype.

    Returns:
        [B, K, D] in the dtype of x.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; an index out of range (checked on CPU in eager
            mode only).

    >>> import torch
    >>> gather_tokens(torch.arange(8.0).view(1, 4, 2), torch.tensor([[1, 3]])).tolist()
    [[[2.0, 3.0], [6.0, 7.0]]]
    """
    check_tokens("x", x)
    check_indices("idx", idx, x.shape[0], x.shape[1], x.device)
    if pos is not None:
        check_pos(pos, x.shape[0], x.shape[1], x.shape[2], x.device)
    return _gather_tokens_reference(x, idx, pos)
