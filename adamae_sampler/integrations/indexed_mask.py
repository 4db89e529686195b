"""A boolean mask that knows its indices, for hosts that write `x[~mask].reshape(B, -1, C)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamae_sampler.integrations.mask_use import MaskUse
from adamae_sampler.mask import MaskSample


class IndexedMask(Tensor):
    """A boolean mask [B, N], True = masked, for which `x[mask]` and `x[~mask]` have static shapes.

    Indexing with a plain boolean mask makes the host wait for the device, to learn the number of rows. Here `x[mask]`
    is [B, M, ...] and `x[~mask]` is [B, K, ...]: the same values, with B and tokens as separate axes. All other
    operations give the results of the plain mask. Changing this mask in place is an error, since its indices would
    not follow.
    """

    rows: Tensor  # [B, 1]
    true_idx: Tensor  # [B, M], where the mask is True
    false_idx: Tensor  # [B, K]
    use: MaskUse | None  # notes that the host did something with the mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Does x[mask] and ~mask by indices, everything else as the plain mask."""
        name = getattr(func, "__name__", "")
        if not torch.compiler.is_compiling() and name not in _LOOKS:
            _note(*args, *(kwargs or {}).values())
        if func is Tensor.__getitem__ and isinstance(args[1], IndexedMask) and not isinstance(args[0], IndexedMask):
            mask = args[1]
            return args[0][mask.rows, mask.true_idx]
        if isinstance(args[0], IndexedMask) and _IN_PLACE.fullmatch(name):
            raise TypeError(
                f"{name} would change this mask and not its indices. Change a copy, "
                "mask.as_subclass(torch.Tensor).clone()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func is Tensor.__invert__:
                use = None if torch.compiler.is_compiling() else args[0].use
                return _indexed(result, args[0].rows, args[0].false_idx, args[0].true_idx, use)
        return result


def indexed_mask(sample: MaskSample, use: MaskUse | None = None) -> Tensor:
    """The sample's mask as an `IndexedMask`; before torch 2.11, the plain mask.

    Args:
        sample: the mask.
        use: the record of the host's forward, in eager mode told whether the host does anything with the mask.
    """
    if not SUPPORTED:
        return sample.mask
    if use is not None and not torch.compiler.is_compiling():
        use.looked_at = False
    rows = torch.arange(sample.mask.shape[0], device=sample.mask.device)[:, None]
    return _indexed(sample.mask, rows, sample.masked_idx, sample.visible_idx, use)


def _indexed(mask: Tensor, rows: Tensor, true_idx: Tensor, false_idx: Tensor, use: MaskUse | None) -> IndexedMask:
    indexed: IndexedMask = mask.as_subclass(IndexedMask)  # shares memory, not the attributes
    indexed.rows, indexed.true_idx, indexed.false_idx = rows, true_idx, false_idx
    if not torch.compiler.is_compiling():
        indexed.use = use
    return indexed


def _note(*values: Any) -> None:
    for each in values:
        if isinstance(each, IndexedMask) and (use := each.__dict__.get("use")) is not None:
            use.looked_at = True


_LOOKS = {"__get__", "dim", "ndimension", "numel", "size"}  # these say nothing of the mask's values
_IN_PLACE = re.compile(r"[a-z]\w*[^_]_|__setitem__")

# Older versions do not call the __torch_function__ of an index, and cannot compile the making of such a tensor.
SUPPORTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
