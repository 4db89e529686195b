"""The K largest keys of each row as lists of indices, in plain PyTorch. draw_mask's reference ends with this step."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import free_to_read


def split_by_largest(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits each row's indices into those of the `count` largest keys and the others.

    Of equal keys the first are taken. NaN is larger than all numbers, as in torch's sort.

    Returns:
        The indices of the largest keys [B, count] and of the others [B, N - count], both ascending; and the others as
        a mask [B, N] bool.
    """
    return _by_topk(keys, count) or _by_rank(_largest(keys, count), count)


def _by_topk(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The split by `topk`. None if keys tie for the last place, or if that check would make the host wait."""
    if not free_to_read(keys):
        return None
    values, order = keys.topk(count, dim=1, sorted=False)
    taken = keys >= values.amin(1, keepdim=True)
    if int(taken.count_nonzero()) != order.numel():
        return None
    left = ~taken
    return order.sort(1).values, left.nonzero()[:, 1].view(len(keys), keys.shape[1] - count), left


def _largest(keys: Tensor, count: int) -> Tensor:
    """Which keys are among the `count` largest, [B, N] bool."""
    keys = keys.nan_to_num(torch.inf, torch.finfo(keys.dtype).max, -torch.inf)  # NaN above infinity
    threshold = keys.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, tie = keys > threshold, keys == threshold
    return above | (tie & (tie.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _by_rank(taken: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both lists by one scatter. A taken token's index in its list is the number of taken tokens before it."""
    batch, num_tokens = taken.shape
    rank = taken.cumsum(1)  # of taken tokens, from 1
    token = torch.arange(num_tokens, device=taken.device)
    place = torch.where(taken, rank, token + (count + 1) - rank)
    split = torch.empty(batch, num_tokens + 1, dtype=torch.int64, device=taken.device)
    split.scatter_(1, place, token.expand(batch, -1))
    return split[:, 1 : count + 1], split[:, count + 1 :], ~taken
