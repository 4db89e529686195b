"""MCG-NJU/VideoMAE."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import AdaptiveHost, HostShape
from adamae_sampler.integrations.indexed_mask import indexed_mask
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.submodules import CachedTokenizer, MaskedSubmodule, PatchedSubmodule
from adamae_sampler.mask import MaskSample


class AdaptiveVideoMAE(AdaptiveHost):
    """`prediction, sample = model(videos)`. Modifications:

    - the sampler draws the mask; a mask can still be passed;
    - forward also returns the sample, for AdaMAELoss in the training engine;
    - boolean indexing uses the sample's indices.
    """

    names: ClassVar[tuple[str, ...]] = ("PretrainVisionTransformer",)
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("x", "mask"),
        "encoder.forward": ("x", "mask"),
        "encoder.patch_embed.proj": nn.Conv3d,
        "encoder.patch_embed.img_size": tuple,
        "encoder.patch_embed.num_patches": int,
    }
    computes_loss = False
    tokenizer = "encoder.patch_embed"
    masks_in = "encoder"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {
        masks_in: MaskedSubmodule,
        tokenizer: CachedTokenizer,
    }

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the forward takes no decode_mask. VideoMAEv2 has the same class name and takes one."""
        return "decode_mask" not in inspect.signature(model.forward).parameters

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape of the patch embedding. The number of its tokens gives the time steps."""
        embed = model.encoder.patch_embed
        height, width = (size // patch for size, patch in zip(embed.img_size, embed.proj.kernel_size[1:], strict=True))
        return HostShape(embed.proj.out_channels, (embed.num_patches // (height * width), height, width))

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError for MAE-DFER's local attention, which no mask of a sampler fits."""
        if getattr(model.encoder, "attn_type", "joint") == "local_global":
            raise HostInterfaceError(
                "the encoder has attn_type='local_global': it cuts the visible tokens into regions by their number, "
                "so each region must show equally many. A sampler's masks would put tokens into "
                "wrong regions in silence. Build the model with attn_type='joint'. The model was left as it was."
            )

    def forward(
        self, x: Tensor, mask: Tensor | MaskSample | None = None, *, valid: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, MaskSample]:
        """x [B, C, T, H, W]; mask [B, N] bool, True = masked; valid [B, N] bool, the tokens that count.

        Returns:
            The host's prediction [B, M, P], and the sample.
        """
        with self.masking(x, mask, valid) as sample:
            prediction = super().forward(x, indexed_mask(sample, self.mask_use), **more)
        return prediction, sample
