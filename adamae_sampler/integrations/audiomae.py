"""facebookresearch/AudioMAE, for spectrograms: random masks, and masks of whole time steps and frequencies."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from adamae_sampler.integrations.host import HostShape, default_ratio
from adamae_sampler.integrations.mae import AdaptiveMAE
from adamae_sampler.integrations.random_masking import visible_first


class AdaptiveAudioMAE(AdaptiveMAE):
    """`loss, pred, mask, contrastive = model(imgs)`. Modifications, beside those of `AdaptiveMAE`:

    - random_masking_2d, which `mask_2d=True` chooses, follows the sampler's mask too.
    """

    masks_in = "random_masking or random_masking_2d"
    overrides = ("random_masking_2d",)
    expected_interface: ClassVar[dict[str, Any]] = {
        **AdaptiveMAE.expected_interface,
        "random_masking_2d": ("x", "mask_t_prob", "mask_f_prob"),
        "mask_2d": bool,
    }

    mask_2d: bool

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the host chooses between the two masks; mae has the same class name."""
        return hasattr(model, "random_masking_2d") and hasattr(model, "mask_2d")

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The grid of patches, which may overlap; and the share that the chosen mask hides."""
        embed = model.patch_embed
        height, width = (
            (size - side) // step + 1
            for size, side, step in zip(embed.img_size, embed.proj.kernel_size, embed.proj.stride, strict=True)
        )
        ratio = default_ratio(model)
        if model.mask_2d:
            shown = int(height * (1 - model.mask_t_prob)) * int(width * (1 - model.mask_f_prob))
            ratio = 1 - shown / (height * width)
        return HostShape(embed.proj.out_channels, (1, height, width), ratio)

    def check_ratio(self, mask_ratio: float | None) -> None:
        """Raises ValueError for another ratio than the sampler's, unless the host ignores the argument."""
        if not self.mask_2d:
            super().check_ratio(mask_ratio)

    def random_masking_2d(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """x [B, N, D] -> the results of `random_masking`. The host's two ratios are those of its own masks."""
        self.mask_use.note_mask(x)
        return visible_first(x, self.mask_use)
