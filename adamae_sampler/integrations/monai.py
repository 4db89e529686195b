"""MONAI's MaskedAutoEncoderViT, for medical images and volumes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from adamae_sampler.integrations.host import AdaptiveHost, HostShape
from adamae_sampler.integrations.submodules import CachedTokenizer, PatchedSubmodule
from adamae_sampler.mask import MaskSample
from adamae_sampler.ops import gather_tokens


class AdaptiveMONAI(AdaptiveHost):
    """`prediction, sample = model(x)`. Modifications:

    - forward takes `mask=`, and returns the prediction of the masked tokens and the sample, for `AdaMAELoss`;
    - masking follows the sampler's mask, and makes nothing on the CPU.

    A volume [B, C, H, W, D] is a clip to the loss: `tubelet_size` is the patch's first side, `patch_size` the others.
    """

    names: ClassVar[tuple[str, ...]] = ("MaskedAutoEncoderViT",)
    masks_in = "_masking"
    computes_loss = False
    overrides = ("_masking",)
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("x", "masking_ratio"),
        "_masking": ("x", "masking_ratio"),
        "img_size": tuple,
        "patch_size": tuple,
        "masking_ratio": float,
        "cls_token": Tensor,
    }
    tokenizer = "patch_embedding.patch_embeddings"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {tokenizer: CachedTokenizer}

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The grid of patches, (1, H, W) for images, and the model's ratio."""
        *first, height, width = (size // patch for size, patch in zip(model.img_size, model.patch_size, strict=True))
        return HostShape(model.cls_token.shape[-1], (*(first or [1]), height, width), model.masking_ratio)

    def scored(self, tokens: Tensor) -> Tensor:
        """[B, D, H, W, D'] of a convolution, or [B, N, D] -> [B, N, D]."""
        return tokens.flatten(2).transpose(1, 2) if tokens.dim() > 3 else tokens

    def forward(
        self,
        x: Tensor,
        masking_ratio: float | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, MaskSample]:
        """x, as in the host; mask [B, N] bool, True = masked; valid [B, N] bool, the tokens that count.

        Returns:
            The prediction [B, M, P], and the sample.
        """
        self.check_ratio(masking_ratio)
        with self.masking(x, mask, valid) as sample:
            prediction, _ = super().forward(x, self.sampler.mask_ratio)
        return gather_tokens(prediction, sample.masked_idx), sample

    def _masking(self, x: Tensor, masking_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> its visible tokens [B, K, D], their indices [B, K], the mask [B, N] int32 with 1 = masked."""
        self.mask_use.note_mask(x, masking_ratio)
        sample = self.current
        return gather_tokens(x, sample.visible_idx), sample.visible_idx, sample.mask.to(torch.int)
