"""facebookresearch/hiera. It masks units of several tokens, and its masks are True where tokens are kept."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.host import AdaptiveHost, HostShape, default_ratio
from adamae_sampler.integrations.submodules import MaskedSubmodule, PatchedSubmodule
from adamae_sampler.integrations.units import unit_mean
from adamae_sampler.mask import MaskSample


class AdaptiveHiera(AdaptiveHost):
    """`loss, pred, label, mask = model(x)`. Modifications:

    - the sampler draws mask units, from the mean of each unit's tokens; a mask can still be passed, True = kept, as in
      the host;
    - the loss includes the sampling loss.
    """

    names: ClassVar[tuple[str, ...]] = ("MaskedAutoencoderHiera",)
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("x", "mask_ratio", "mask"),
        "patch_embed.forward": ("x", "mask"),
        "patch_embed.proj": nn.Module,
        "mask_spatial_shape": list,
        "tokens_spatial_shape": list,
        "tokens_spatial_shape_final": list,
    }
    mask_spatial_shape: list[int]
    tokens_spatial_shape: list[int]
    tokens_spatial_shape_final: list[int]

    # No cache, since the host blanks masked pixels before its overlapping convolution: cached tokens would leak them.
    masks_in = "patch_embed"
    patched_submodules: ClassVar[dict[str, type[PatchedSubmodule]]] = {masks_in: MaskedSubmodule}

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The width of the tokens, and the grid of mask units."""
        units = model.mask_spatial_shape
        grid = (1,) * (3 - len(units)) + tuple(units)
        return HostShape(model.patch_embed.proj.out_channels, grid, default_ratio(model))

    def scored(self, tokens: Tensor) -> Tensor:
        """Means over mask units [B, units, D]."""
        return unit_mean(tokens, self.tokens_spatial_shape, self.mask_spatial_shape)

    def forward(
        self,
        x: Tensor,
        mask_ratio: float | None = None,
        mask: Tensor | MaskSample | None = None,
        *,
        valid: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """x, as in the host; mask [B, mask units] bool, True = kept -> the host's outputs.

        valid [B, mask units] bool: the mask units that count.
        """
        self.check_ratio(mask_ratio)
        with self.masking(x, self._hidden(mask) if isinstance(mask, Tensor) else mask, valid) as sample:
            handed = self.mask_use.handed = ~sample.mask
            loss, pred, label, kept = super().forward(x, self.sampler.mask_ratio, handed, **more)

            def token_error() -> Tensor:
                return self.unit_error((pred - label).square().mean(dim=-1), sample)

            return self.total(loss, token_error=token_error), pred, label, kept

    def _hidden(self, kept: Tensor) -> MaskSample:
        try:
            return MaskSample.from_mask(~kept.bool(), self.sampler.num_visible)
        except ValueError as error:
            raise ValueError(
                f"the mask was taken as Hiera's, True = kept, and inverted. The inverted mask is wrong: {error}"
            ) from error

    def unit_error(self, error: Tensor, sample: MaskSample) -> Tensor:
        """Errors of the masked predictions, clip by clip in spatial order -> errors of the mask units [B, M]."""
        units, positions = self.mask_spatial_shape, self.tokens_spatial_shape_final
        masked = sample.mask.view(-1, *units)
        for axis, (unit, position) in enumerate(zip(units, positions, strict=True), start=1):
            masked = masked.repeat_interleave(position // unit, dim=axis)
        masked = masked.flatten(1)  # [B, predictions]
        num_visible = sample.num_visible * (math.prod(positions) // math.prod(units))
        masked_idx = MaskSample.from_mask(masked, num_visible).masked_idx
        everywhere = torch.zeros(masked.shape, dtype=error.dtype, device=error.device)
        everywhere = everywhere.scatter(1, masked_idx, error.view(masked_idx.shape))
        return unit_mean(everywhere[..., None], positions, units).squeeze(-1).gather(1, sample.masked_idx)
