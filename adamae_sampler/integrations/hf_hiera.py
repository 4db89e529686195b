"""Hugging Face HieraForPreTraining. It masks units of several tokens, before it makes the tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape
from adamae_sampler.integrations.huggingface import HuggingFaceHost, check_no_noise, normalized
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.random_masking import restoring_order
from adamae_sampler.integrations.submodules import PatchedSubmodule
from adamae_sampler.integrations.units import unit_mean
from adamae_sampler.mask import MaskSample


class GivenUnits(PatchedSubmodule):
    """Mixin of the patch embeddings. Modifications:

    - random_masking follows the sampler's mask.
    """

    def random_masking(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] -> the host's mask of units [B, units], True = kept, and ids_restore [B, units]."""
        if self._use is None:
            raise HostInterfaceError(
                "the encoder of a patched HieraForPreTraining was called by itself, without a mask. Call the model as "
                "a whole. For features, unpatch(model)."
            )
        self._use.note_mask(clips=pixel_values.shape[0])
        sample = self._use.sample
        kept = self._use.handed = ~sample.mask
        return kept, restoring_order(sample.visible_idx, sample.masked_idx)


class AdaptiveHFHiera(HuggingFaceHost):
    """`output = model(pixel_values)`. Modifications:

    - the sampler draws mask units, from the mean of each unit's tokens;
    - forward takes `mask=`, True = masked, and no noise; `output.bool_masked_pos` is the host's, True = kept;
    - the loss includes the sampling loss, computed from the errors that the host's own loss averages.
    """

    names: ClassVar[tuple[str, ...]] = ("HieraForPreTraining",)
    masks_in = "hiera.embeddings.patch_embeddings.random_masking"
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("pixel_values", "noise"),
        "hiera.embeddings.patch_embeddings.random_masking": ("pixel_values", "noise"),
        "hiera.embeddings.patch_embeddings.projection": nn.Conv2d,
        "hiera.embeddings.patch_embeddings.tokens_spatial_shape": list,
        "hiera.embeddings.patch_embeddings.mask_spatial_shape": list,
        "decoder.tokens_spatial_shape_final": list,
        "pred_stride": int,
        "config.normalize_pixel_loss": bool,
    }
    # The unmasked image's tokens score it; the host blanks masked pixels before it makes its own.
    tokenizer = "hiera.embeddings.patch_embeddings.projection"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {"hiera.embeddings.patch_embeddings": GivenUnits}

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The width of the tokens, the grid of mask units, and the ratio of the configuration."""
        embed = model.hiera.embeddings.patch_embeddings
        return HostShape(embed.projection.out_channels, (1, *embed.mask_spatial_shape), model.config.mask_ratio)

    def scored(self, tokens: Tensor) -> Tensor:
        """[B, D, H, W] -> the means over mask units [B, units, D]."""
        embed: Any = self.get_submodule("hiera.embeddings.patch_embeddings")
        return unit_mean(tokens.flatten(2).transpose(1, 2), embed.tokens_spatial_shape, embed.mask_spatial_shape)

    def forward(
        self,
        pixel_values: Tensor,
        noise: None = None,
        return_dict: bool | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
        mask_ratio: float | None = None,
        return_loss: bool = True,  # tells Trainer.evaluate that there is a loss without labels
        **kwargs: Any,
    ) -> Any:
        """pixel_values [B, C, H, W]; mask [B, units] bool, True = masked -> the host's output.

        valid [B, units] bool: the mask units that count.
        """
        check_no_noise(noise)
        self.check_ratio(mask_ratio)
        with self.masking(pixel_values, mask, valid) as sample:
            output, loss, logits = self.host_output(pixel_values, **kwargs)

            def token_error() -> Tensor:
                return self.unit_error(logits, pixel_values).gather(1, sample.masked_idx)

            output["loss"] = self.total(loss, token_error=token_error)
        return self.finish(output, return_dict)

    def unit_error(self, prediction: Tensor, pixel_values: Tensor) -> Tensor:
        """The errors [B, units] against the host's target, means over the predictions of each unit."""
        model: Any = self
        side, units = model.pred_stride, model.hiera.embeddings.patch_embeddings.mask_spatial_shape
        # Values of a patch lie (c p q).
        target = pixel_values.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
        target = target.flatten(1, 2).flatten(2)
        target = normalized(target) if self.config.normalize_pixel_loss else target
        error = (prediction - target).square().mean(dim=-1, keepdim=True)  # [B, predictions, 1]
        return unit_mean(error, model.decoder.tokens_spatial_shape_final, units).squeeze(-1)
