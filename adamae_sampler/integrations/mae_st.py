"""facebookresearch/mae_st, masked autoencoders for video, with or without a class token and separable positions."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from adamae_sampler.integrations.host import HostShape, default_ratio
from adamae_sampler.integrations.mae import AdaptiveMAE
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.weighted_loss import check_forward_loss


class AdaptiveMAEST(AdaptiveMAE):
    """`loss, pred, mask = model(imgs)`. Modifications, beside those of `AdaptiveMAE`:

    - tokens come as [B, T, H W, D];
    - random_masking also returns the indices of the visible tokens.
    """

    expected_interface: ClassVar[dict[str, Any]] = {
        **{name: kind for name, kind in AdaptiveMAE.expected_interface.items() if name != "patch_embed.proj"},
        "patch_embed.proj": nn.Conv3d,
        "patch_embed.input_size": tuple,
    }

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the host takes video."""
        return hasattr(model, "t_pred_patch_size")

    @staticmethod
    def host_shape(model: Any) -> HostShape:
        """The shape of the patch embedding."""
        embed = model.patch_embed
        return HostShape(embed.proj.out_channels, tuple(embed.input_size), default_ratio(model))

    @staticmethod
    def probe(model: Any) -> None:
        """Raises HostInterfaceError as `AdaptiveMAE.probe`, or unless each token has exactly one error."""
        embed = model.patch_embed
        frames = embed.frames // embed.t_patch_size * model.t_pred_patch_size
        if frames != model.pred_t_dim:
            raise HostInterfaceError(
                f"the decoder predicts {model.pred_t_dim} frames, expected {frames}. Build the model with a pred_t_dim "
                "that is a multiple of its time steps."
            )
        shape = (1, embed.proj.in_channels, embed.frames, *embed.img_size)
        check_forward_loss(model, model.decoder_pred, shape, math.prod(embed.input_size))

    def scored(self, tokens: Tensor) -> Tensor:
        """[B, T, H W, D] -> [B, N, D]."""
        return tokens.flatten(1, 2)

    def random_masking(self, x: Tensor, mask_ratio: float | None = None, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """x [B, N, D] -> the results of `AdaptiveMAE.random_masking`, and the indices of the visible tokens [B, K]."""
        return *super().random_masking(x, mask_ratio), self.current.visible_idx
