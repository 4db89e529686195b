"""What a host's forward did with the sampler's mask, and the errors if that is not what the patch expects."""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.mask import MaskSample


class MaskUse:
    """The record of one forward of a host. It counts, and compares shapes and addresses.

    Args:
        host_class: the class of the host.
        where: the host's method or submodule that masks, for messages.
        sample: the sampler's mask.
        mask_ratio: the ratio of the patch.

    Attributes:
        handed: the tensor in which the host got the mask.
        looked_at: whether the host did anything with an `IndexedMask`; None if it got no such mask.
    """

    def __init__(self, host_class: type[nn.Module], where: str, sample: MaskSample, mask_ratio: float) -> None:
        self.host_class, self.where, self.sample, self.mask_ratio = host_class, where, sample, mask_ratio
        self.handed: Tensor | None = None
        self.looked_at: bool | None = None
        self.masked = 0  # times that the host masked its tokens with the sampler's mask
        self.losses = 0

    def note_mask(
        self, tokens: Tensor | None = None, mask_ratio: float | None = None, clips: int | None = None
    ) -> None:
        """The host takes the mask.

        Args:
            tokens: [B, N, D], the tokens that the host masks; None if the host gets the mask itself.
            mask_ratio: the ratio that the host asks for; None if it does not say.
            clips: B, for hosts that mask before there are tokens.

        Raises:
            HostInterfaceError: the mask is used a second time, for other tokens, or at another ratio.
        """
        expected = tuple(self.sample.mask.shape)
        found = expected if tokens is None else tuple(tokens.shape[:2])
        found = found if clips is None else (clips, found[1])
        if found != expected:
            raise self._error(
                f"masked {found[1]} tokens of {found[0]} clips in {self.where}, expected {expected[1]} "
                f"of {expected[0]}. The sampler's indices would name other tokens (is a class or register token "
                "among them? several views?)"
            )
        if isinstance(mask_ratio, (int, float)) and abs(mask_ratio - self.mask_ratio) > 1e-9:
            raise self._error(
                f"asked {self.where} for mask_ratio={mask_ratio}, expected the patch's {self.mask_ratio}. The "
                "sampler's ratio is fixed: give patch the host's ratio, and switch a schedule of ratios off"
            )
        self.masked += 1
        if self.masked > 1:
            raise self._error(
                f"masked tokens in {self.where} a second time, expected once. Both would have the mask of the first. "
                "Call the model for one view at a time"
            )

    def note_loss(self) -> None:
        """The host computed its loss.

        Raises:
            HostInterfaceError: this is the second loss of the forward.
        """
        self.losses += 1
        if self.losses > 1:
            raise self._error("computed its loss a second time, expected once, so the sampling loss would count twice")

    def check_loss_mask(self, mask: Any) -> None:
        """Raises HostInterfaceError if the host weighs its errors with another mask than it was given."""
        if not self.masked:
            raise self.unmasked()
        if not self.is_handed(mask):
            raise self._error(
                "computed its loss with another mask than that of its tokens, so the sampling loss would be that of "
                "other tokens"
            )

    def is_handed(self, mask: Any) -> bool:
        """Whether a tensor is the mask that was handed to the host, a view or a copy of it."""
        if not isinstance(mask, Tensor) or self.handed is None or mask.numel() != self.handed.numel():
            return False
        if mask is self.handed or torch.compiler.is_compiling():  # addresses are unknown there
            return True
        with torch._C.DisableTorchFunctionSubclass():
            plain, handed = mask.as_subclass(Tensor), self.handed.as_subclass(Tensor)
            if plain.data_ptr() == handed.data_ptr() or self.host_class in _COPYING:
                return True
            # A class that copies its mask is found to do so once. Later steps read nothing back from the device.
            same = torch.equal(plain.flatten().to(handed), handed.flatten())
        if same:
            _COPYING.add(self.host_class)
        return same

    def check(self, computes_loss: bool) -> None:
        """Called after the host's forward.

        Args:
            computes_loss: whether the host had to compute its loss.

        Raises:
            HostInterfaceError: the mask was not used, or there was no loss.
        """
        if not self.masked:
            raise self.unmasked()
        if computes_loss and not self.losses:
            raise self._error(
                "was expected to compute its loss where the patch adds the sampling loss, and did not. The sampler "
                "would not learn"
            )

    def unmasked(self) -> HostInterfaceError:
        """The error of a host that did not use the mask. It names what else may mask."""
        others = [
            name
            for name in dir(self.host_class)
            if "mask" in name
            and "attention" not in name
            and name not in re.split(r"\W+", self.where)
            and callable(getattr(self.host_class, name))
        ]
        found = f" It also has {', '.join(others)}: switch it to {self.where}." if others else ""
        return self._error(
            f"was expected to mask its tokens with the sampler's mask, in {self.where}, and did not. It may have a "
            f"mask of its own.{found} Nothing else would use the sampler's mask"
        )

    def _error(self, what: str) -> HostInterfaceError:
        return HostInterfaceError(
            f"the forward of {self.host_class.__name__} {what}. The patch does not fit this version or these options "
            "of the model. unpatch(model) gives the host back. To mend it, see 'A new host' in "
            "adamae_sampler/integrations/README.md."
        )


_COPYING: WeakSet[type[nn.Module]] = WeakSet()
