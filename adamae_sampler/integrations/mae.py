"""facebookresearch/mae, and masked autoencoders for images of that family."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape, default_ratio
from adamae_sampler.integrations.random_masking import visible_first
from adamae_sampler.integrations.weighted_loss import WeightedLossHost, check_forward_loss
from adamae_sampler.mask import MaskSample


class AdaptiveMAE(WeightedLossHost):
    """`loss, pred, mask = model(imgs)`. Modifications:

    - forward takes `mask=`, and the ratio may be left out;
    - random_masking follows the sampler's mask;
    - forward_loss adds the sampling loss.
    """

    names: ClassVar[tuple[str, ...]] = ("MaskedAutoencoderViT",)
    masks_in = "random_masking"
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("imgs", "mask_ratio"),
        "random_masking": ("x", "mask_ratio"),
        "forward_loss": ("imgs", "pred", "mask"),
        "patch_embed.proj": nn.Conv2d,
        "patch_embed.img_size": tuple,
        "patch_embed.patch_size": tuple,
        "decoder_pred": nn.Linear,
    }

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the host takes images and has one mask; mae_st and AudioMAE have the same class name."""
        return not hasattr(model, "t_pred_patch_size") and not hasattr(model, "mask_2d")

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape of the patch embedding, which any version of timm provides."""
        embed = model.patch_embed
        height, width = (size // patch for size, patch in zip(embed.img_size, embed.patch_size, strict=True))
        return HostShape(embed.proj.out_channels, (1, height, width), default_ratio(model))

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError unless forward_loss is a mean weighted by the mask; the sampling loss needs one."""
        embed = model.patch_embed
        shape = (1, embed.proj.in_channels, *embed.img_size)
        check_forward_loss(model, model.decoder_pred, shape, embed.num_patches)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """imgs, as in the host; mask [B, N] bool, True = masked; valid [B, N] bool, the tokens that count.

        Returns:
            The host's outputs.
        """
        self.check_ratio(mask_ratio)
        with self.masking(imgs, mask, valid):
            return super().forward(imgs, self.sampler.mask_ratio, **more)

    def random_masking(self, x: Tensor, mask_ratio: float | None = None, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """x [B, N, D] -> its visible tokens [B, K, D], the mask [B, N] with 1 = masked, ids_restore [B, N]."""
        self.mask_use.note_mask(x, mask_ratio)
        return visible_first(x, self.mask_use)
