"""Hugging Face ViTMAEForPreTraining."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape
from adamae_sampler.integrations.huggingface import HuggingFaceHost, check_no_noise, image_grid, normalized, one_of
from adamae_sampler.integrations.random_masking import GivenMask
from adamae_sampler.integrations.submodules import CachedTokenizer, PatchedSubmodule
from adamae_sampler.mask import MaskSample
from adamae_sampler.positions import GridSize


class AdaptiveHFViTMAE(HuggingFaceHost):
    """`output = model(pixel_values)`. Modifications:

    - forward takes `mask=` (or `bool_masked_pos=`), and no noise;
    - the loss includes the sampling loss, computed from the errors that the host's own loss averages.
    """

    names: ClassVar[tuple[str, ...]] = ("ViTMAEForPreTraining",)
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("pixel_values", "noise"),
        "patchify": ("pixel_values", "interpolate_pos_encoding"),
        "vit.embeddings.random_masking": ("sequence", "noise"),
        "vit.embeddings.patch_embeddings.projection": nn.Conv2d,
        "config.norm_pix_loss": bool,
    }
    tokenizer = "vit.embeddings.patch_embeddings"
    masks_in = "vit.embeddings.random_masking"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {
        "vit.embeddings": GivenMask,
        "vit.embeddings.patch_embeddings": CachedTokenizer,
    }

    patchify: Any

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape and the ratio that the configuration gives."""
        return HostShape(model.config.hidden_size, (1, *image_grid(model.config)), model.config.mask_ratio)

    def grid_of(self, inputs: Tensor) -> GridSize:
        """Images of any size, with interpolate_pos_encoding=True."""
        patch = self.config.patch_size
        return 1, inputs.shape[2] // patch, inputs.shape[3] // patch

    def forward(
        self,
        pixel_values: Tensor,
        noise: None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        bool_masked_pos: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
        mask_ratio: float | None = None,
        return_loss: bool = True,  # tells Trainer.evaluate that there is a loss without labels
        **kwargs: Any,
    ) -> Any:
        """pixel_values [B, C, H, W]; mask [B, N] bool, True = masked -> the host's output.

        valid [B, N] bool: the tokens that count.
        """
        check_no_noise(noise)
        self.check_ratio(mask_ratio)
        if interpolate_pos_encoding:  # not every subclass takes it
            kwargs["interpolate_pos_encoding"] = True
        with self.masking(pixel_values, one_of(mask, bool_masked_pos), valid) as sample:
            output, loss, logits = self.host_output(pixel_values, **kwargs)

            def token_error() -> Tensor:
                error = self.token_error(logits, pixel_values, interpolate_pos_encoding)
                return error.gather(1, sample.masked_idx)

            output["loss"] = self.total(loss, token_error=token_error)
        return self.finish(output, return_dict)

    def token_error(self, prediction: Tensor, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """The errors [B, N] against the host's target, which normalises the channels of a patch together."""
        target = self.patchify(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        target = normalized(target) if self.config.norm_pix_loss else target
        return (prediction - target).square().mean(dim=-1)
