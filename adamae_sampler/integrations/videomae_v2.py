"""OpenGVLab/VideoMAEv2. Its decoder has a mask of its own."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor

from adamae_sampler.integrations.videomae import AdaptiveVideoMAE
from adamae_sampler.mask import MaskSample


class AdaptiveVideoMAEv2(AdaptiveVideoMAE):
    """`prediction, sample = model(images, decode_mask=decode_mask)`. Modifications: those of `AdaptiveVideoMAE`.

    The caller still passes the decoder's mask.
    """

    expected_interface: ClassVar[dict[str, Any]] = {
        **AdaptiveVideoMAE.expected_interface,
        "forward": ("x", "mask", "decode_mask"),
    }

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the forward takes a decode_mask."""
        return "decode_mask" in inspect.signature(model.forward).parameters

    def forward(
        self, x: Tensor, mask: Tensor | MaskSample | None = None, decode_mask: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, MaskSample]:
        """As `AdaptiveVideoMAE`'s; decode_mask [B, N] bool, True = not decoded.

        Without a decode_mask the prediction is [B, M, P]. With one it is [B, decoded tokens, P], and AdaMAELoss takes
        the same decode_mask.
        """
        return super().forward(x, mask, decode_mask=decode_mask, **more)
