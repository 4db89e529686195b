"""PrithviMAE of terratorch, for series of satellite images."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape
from adamae_sampler.integrations.random_masking import GivenMask
from adamae_sampler.integrations.submodules import CachedTokenizer, PatchedSubmodule
from adamae_sampler.integrations.weighted_loss import WeightedLossHost, check_forward_loss
from adamae_sampler.mask import MaskSample
from adamae_sampler.positions import GridSize


class AdaptivePrithvi(WeightedLossHost):
    """`loss, pred, mask = model(pixel_values, temporal_coords, location_coords)`; `loss["loss"]` trains. Modifications:

    - forward takes `mask=`, and the ratio may be left out;
    - the encoder's random_masking follows the sampler's mask;
    - forward_loss adds the sampling loss.
    """

    names: ClassVar[tuple[str, ...]] = ("PrithviMAE",)
    masks_in = "encoder.random_masking"
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("pixel_values", "temporal_coords", "location_coords", "mask_ratio"),
        "forward_loss": ("pixel_values", "pred", "mask"),
        "encoder.random_masking": ("sequence", "mask_ratio", "noise"),
        "encoder.patch_embed.proj": nn.Conv3d,
        "decoder.decoder_pred": nn.Linear,
    }
    tokenizer = "encoder.patch_embed"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {
        "encoder": GivenMask,
        tokenizer: CachedTokenizer,
    }

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape of the patch embedding, and the model's ratio."""
        embed = model.encoder.patch_embed
        return HostShape(embed.proj.out_channels, tuple(embed.grid_size), model.mask_ratio)

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError unless forward_loss is a mean weighted by the mask; the sampling loss needs one."""
        embed = model.encoder.patch_embed
        shape = (1, embed.proj.in_channels, *embed.input_size)
        check_forward_loss(model, model.decoder.decoder_pred, shape, math.prod(embed.grid_size))

    def grid_of(self, inputs: Tensor) -> GridSize:
        """Series of any length and size; the host resamples its positions."""
        patch: Any = self.get_submodule(self.tokenizer).patch_size
        t, h, w = (size // side for size, side in zip(inputs.shape[2:], patch, strict=True))
        return t, h, w

    def forward(
        self,
        pixel_values: Tensor,
        temporal_coords: Tensor | None = None,
        location_coords: Tensor | None = None,
        mask_ratio: float | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
    ) -> Any:
        """pixel_values [B, C, T, H, W], or [B, C, H, W]; mask [B, N] bool, True = masked -> the host's outputs.

        valid [B, N] bool: the tokens that count, such as those with data.
        """
        self.check_ratio(mask_ratio)
        one_step = pixel_values.dim() == 4
        video = self.as_video(pixel_values)
        with self.masking(video, mask, valid):
            loss, prediction, pixels = super().forward(video, temporal_coords, location_coords, self.sampler.mask_ratio)
        if one_step:  # as the host returns it
            return loss, prediction.squeeze(2), pixels.squeeze(1)
        return loss, prediction, pixels
