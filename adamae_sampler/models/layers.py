"""Layers of the reference model that timm lacks: a video patch embedding and a 1-d sinusoid table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_sampler.ops.checks import at_least_fp32
from adamae_sampler.ops.patch_format import PatchFormat
from adamae_sampler.ops.pixel_rows import rows_of_patches

_MIDDLE = 128.0  # uint8 pixels minus 128 are exact in half precision, and their sums lose fewer digits


class PatchEmbed3d(nn.Module):
    """Tubelets to tokens: a 3-d convolution whose stride is its kernel (Table 5, "Tokenization"), as a matrix product.

    For uint8 video the mean and std are folded into the weights. Half precision holds the pixels exactly, so the
    product equals that of normalised pixels up to rounding, and a GPU makes no fp32 copy of the video.

    Args:
        patches: how the video is cut. uint8 video needs a format with mean and std.
        in_chans: channels of the video.
        embed_dim: D, width of the tokens.

    Raises:
        ValueError: mean and std have another number of channels than the video.
    """

    def __init__(self, patches: PatchFormat, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patches.mean is not None and len(patches.mean) != in_chans:
            raise ValueError(
                f"mean={patches.mean} and std={patches.std}, expected {in_chans} numbers each, one for a channel, or "
                "neither."
            )
        self.patches = patches
        kernel = patches.patch
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)  # checkpoints use this name

    def dtype_for(self, video: Tensor) -> torch.dtype:
        """The dtype of the product: autocast's; without autocast the video's, or for uint8 video the weights'."""
        device = video.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return video.dtype if video.is_floating_point() else self.proj.weight.dtype

    def layer_for(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight [D, P] and bias [D] for patches of the video, in the dtype of the product.

        Raises:
            TypeError: the video is uint8, and there is no mean and std.
        """
        weight, bias = self.proj.weight, self.proj.bias
        if video.dtype == torch.uint8:
            mean, std = self.patches.mean, self.patches.std
            if mean is None or std is None:
                raise TypeError("video is uint8, and the model has no mean and std to normalise it. Give it both.")
            channels = list(zip(at_least_fp32(weight).unbind(1), mean, std, strict=True))
            # Plain numbers: a tensor of them would be copied to the device, and the host would wait.
            weight = torch.stack([x / (255 * scale) for x, _, scale in channels], dim=1)
            shifts = [x.sum((1, 2, 3)) * ((_MIDDLE / 255 - shift) / scale) for x, shift, scale in channels]
            bias = torch.stack([*shifts, *([] if bias is None else [bias])]).sum(0)
        dtype = self.dtype_for(video)
        return weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype)

    def forward(
        self, video: Tensor, idx: Tensor | None = None, *, layer: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        """Embeds all patches, or those of `idx`.

        Args:
            video: [B, C, T, H, W].
            idx: [B R, K] int64, the tokens to embed; None embeds all.
            layer: the result of `layer_for`, for a caller that embeds twice.

        Returns:
            [B, N, D], tokens in t-h-w order; or [B R, K, D].

        Raises:
            TypeError: see `layer_for`.
        """
        weight, bias = layer or self.layer_for(video)
        offset = _MIDDLE if video.dtype == torch.uint8 else 0.0
        rows = rows_of_patches(video, idx, self.patches, dtype=weight.dtype, offset=offset)
        return F.linear(rows, weight, bias)


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """[1, N, D] fixed position embedding: sin and cos of n / 10000^(2 floor(d/2) / D), over the flat token index."""
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    even = torch.arange(width, dtype=torch.float64) // 2 * 2
    angle = position / 10000.0 ** (even / width)  # [N, D]
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]
