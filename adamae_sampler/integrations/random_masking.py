"""The results of MAE's random_masking, for a mask that the sampler drew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adamae_sampler.integrations.mask_use import MaskUse
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.submodules import PatchedSubmodule
from adamae_sampler.ops import gather_tokens


class GivenMask(PatchedSubmodule):
    """Mixin of a submodule with a random_masking. Modifications:

    - random_masking follows the sampler's mask.
    """

    def random_masking(self, sequence: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Sequence [B, N, D] -> its visible tokens [B, K, D], the mask [B, N] with 1 = masked, ids_restore [B, N]."""
        if self._use is None:
            raise HostInterfaceError(
                f"{type(self).__name__} of a patched model was called by itself, without a mask; or the backward pass "
                "recomputes it, when the mask is gone. Call the model as a whole, and checkpoint the blocks within it. "
                "For features, unpatch(model)."
            )
        ratio = next((each for each in (*args, *kwargs.values()) if isinstance(each, float)), None)
        self._use.note_mask(sequence, ratio)
        return visible_first(sequence, self._use)


def visible_first(x: Tensor, use: MaskUse) -> tuple[Tensor, Tensor, Tensor]:
    """The results of MAE's random_masking: visible tokens, the mask with 1 = masked, and ids_restore.

    Args:
        x: [B, N, D].
        use: the record of the host's forward, which gets the mask that the host is handed.

    Returns:
        [B, K, D]; [B, N] float; [B, N] int64, the token's index in the sequence of visible, then masked tokens.
    """
    visible_idx, masked_idx, mask, *_ = use.sample
    use.handed = mask.float()
    return gather_tokens(x, visible_idx), use.handed, restoring_order(visible_idx, masked_idx)


def restoring_order(visible_idx: Tensor, masked_idx: Tensor) -> Tensor:
    """MAE's ids_restore [B, N] int64: the place of each token among visible [B, K], then masked tokens [B, M]."""
    order = torch.cat([visible_idx, masked_idx], dim=1)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)
