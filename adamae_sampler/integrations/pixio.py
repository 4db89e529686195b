"""facebookresearch/pixio. It masks units of several tokens, and has several class tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape
from adamae_sampler.integrations.random_masking import restoring_order
from adamae_sampler.integrations.units import unit_mean
from adamae_sampler.integrations.weighted_loss import WeightedLossHost, check_forward_loss
from adamae_sampler.mask import MaskSample
from adamae_sampler.ops import gather_tokens

_RATIO = 0.75  # of its training script; its forward has no default


class AdaptivePixio(WeightedLossHost):
    """`loss = model(imgs)`. Modifications:

    - the sampler draws units of `mask_grid` x `mask_grid` tokens, from the mean of each unit's tokens;
    - forward takes `mask=`, of units, and the ratio may be left out;
    - random_masking follows the sampler's mask;
    - forward_loss adds the sampling loss.
    """

    names: ClassVar[tuple[str, ...]] = ("PixioViT",)
    masks_in = "random_masking"
    expected_interface: ClassVar[dict[str, Any]] = {
        "forward": ("imgs", "mask_ratio"),
        "random_masking": ("x", "mask_ratio", "grid"),
        "forward_loss": ("imgs", "pred", "mask"),
        "patch_embed.proj": nn.Conv2d,
        "patch_embed.grid_size": tuple,
        "patch_embed.img_size": tuple,
        "mask_grid": int,
        "decoder_pred": nn.Linear,
    }
    mask_grid: int

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The width of the tokens, and the grid of mask units."""
        height, width = (side // model.mask_grid for side in model.patch_embed.grid_size)
        return HostShape(model.patch_embed.proj.out_channels, (1, height, width), _RATIO)

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError unless forward_loss is a mean weighted by the mask; the sampling loss needs one."""
        embed = model.patch_embed
        shape = (1, embed.proj.in_channels, *embed.img_size)
        check_forward_loss(model, model.decoder_pred, shape, math.prod(embed.grid_size))

    def scored(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> the means over mask units [B, units, D]."""
        return unit_mean(tokens, [side * self.mask_grid for side in self._units], self._units)

    @property
    def _units(self) -> list[int]:
        grid: Any = self.get_submodule(self.tokenizer).grid_size
        return [side // self.mask_grid for side in grid]

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float | None = None,
        *,
        mask: Tensor | MaskSample | None = None,
        valid: Tensor | None = None,
    ) -> Any:
        """imgs, as in the host; mask [B, units] bool, True = masked; valid [B, units] bool, the units that count.

        Returns:
            The host's loss.
        """
        self.check_ratio(mask_ratio)
        with self.masking(imgs, mask, valid):
            return super().forward(imgs, self.sampler.mask_ratio)

    def random_masking(self, x: Tensor, mask_ratio: float, grid: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> the tokens of visible units, the mask [B, N] with 1 = masked, ids_restore [B, N]."""
        use, (height, width) = self.mask_use, self._units
        use.note_mask(x[:, :: grid**2], mask_ratio)
        tokens = torch.arange(x.shape[1], device=x.device).view(height, grid, width, grid)
        of_unit = tokens.transpose(1, 2).reshape(height * width, grid**2)  # the host shows its tokens unit by unit
        visible, masked = (of_unit[idx].flatten(1) for idx in (use.sample.visible_idx, use.sample.masked_idx))
        use.handed = self.of_tokens(use.sample.mask).float()
        return gather_tokens(x, visible), use.handed, restoring_order(visible, masked)

    def of_tokens(self, of_units: Tensor) -> Tensor:
        """[B, units] -> [B, N]: each token gets the value of its unit."""
        grid = of_units.unflatten(1, tuple(self._units))
        for axis in (1, 2):
            grid = grid.repeat_interleave(self.mask_grid, axis)
        return grid.flatten(1)
