"""Hugging Face VideoMAEForPreTraining."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape
from adamae_sampler.integrations.huggingface import HuggingFaceHost, image_grid, one_of
from adamae_sampler.integrations.indexed_mask import indexed_mask
from adamae_sampler.integrations.submodules import CachedTokenizer, MaskedSubmodule, PatchedSubmodule
from adamae_sampler.losses import reconstruction_error
from adamae_sampler.mask import MaskSample


class AdaptiveHFVideoMAE(HuggingFaceHost):
    """`output = model(pixel_values)`. Modifications:

    - the sampler draws the mask; a mask can still be passed, also as `mask=`;
    - the loss includes the sampling loss, computed from the errors that the host's own loss averages;
    - boolean indexing uses the sample's indices.
    """

    names: ClassVar[tuple[str, ...]] = ("VideoMAEForPreTraining",)
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("pixel_values", "bool_masked_pos"),
        "videomae.embeddings.forward": ("pixel_values", "bool_masked_pos"),
        "videomae.embeddings.patch_embeddings.projection": nn.Conv3d,
        "config.norm_pix_loss": bool,
    }
    tokenizer = "videomae.embeddings.patch_embeddings"
    masks_in = "videomae.embeddings"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {
        masks_in: MaskedSubmodule,
        tokenizer: CachedTokenizer,
    }

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape that the configuration gives."""
        config = model.config
        return HostShape(config.hidden_size, (config.num_frames // config.tubelet_size, *image_grid(config)))

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | MaskSample | None = None,
        return_dict: bool | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
        mask_ratio: float | None = None,
        return_loss: bool = True,  # tells Trainer.evaluate that there is a loss without labels
        **kwargs: Any,
    ) -> Any:
        """pixel_values [B, T, C, H, W]; bool_masked_pos or mask [B, N] bool, True = masked -> the host's output.

        valid [B, N] bool: the tokens that count.
        """
        self.check_ratio(mask_ratio)
        with self.masking(pixel_values, one_of(bool_masked_pos, mask), valid) as sample:
            output, loss, logits = self.host_output(pixel_values, indexed_mask(sample, self.mask_use), **kwargs)

            def token_error() -> Tensor:
                return self.token_error(logits, pixel_values, sample)

            output["loss"] = self.total(loss, token_error=token_error)
        return self.finish(output, return_dict)

    def as_video(self, inputs: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, C, T, H, W]."""
        return inputs.transpose(1, 2)

    def token_error(self, prediction: Tensor, pixel_values: Tensor, sample: MaskSample) -> Tensor:
        """The errors [B, M] against the host's target, which undoes ImageNet's normalisation of RGB video."""
        rgb = self.config.num_channels == 3
        return reconstruction_error(
            prediction,
            self.as_video(pixel_values),
            sample,
            normalize=self.config.norm_pix_loss,
            patch_size=self.config.patch_size,
            tubelet_size=self.config.tubelet_size,
            mean=IMAGENET_DEFAULT_MEAN if rgb else None,
            std=IMAGENET_DEFAULT_STD if rgb else None,
        )
