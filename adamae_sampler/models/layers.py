"""The parts of the reference model that timm does not have: video patch embedding and a 1-d sinusoid table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_sampler.ops import patch_tokens
from adamae_sampler.ops.checks import at_least_fp32
from adamae_sampler.ops.patches import PatchSize, patch_pair

_MIDDLE = 128.0  # uint8 pixels less this keep the digits of sums in half precision, and are exact in it


class PatchEmbed3d(nn.Module):
    """Tubelets to tokens: a 3-d convolution whose stride is its kernel (Table 5, "Tokenization"), as a matrix product.

    uint8 video is normalised by the weights: their product with the pixels, which half precision holds exactly, is what
    the weights would make of normalised ones up to rounding, and no fp32 copy of the video is made on a GPU.

    Args:
        patch_size: height and width of a patch in pixels.
        tubelet_size: frames of a patch.
        in_chans: channels of the video.
        embed_dim: D, width of the tokens.
        mean: of uint8 pixels, as shares of 255, a number for each channel; None if there will be none.
        std: the standard deviations that go with it.

    Raises:
        ValueError: a mean or std of other channels than the video's.
    """

    def __init__(
        self,
        patch_size: PatchSize,
        tubelet_size: int,
        in_chans: int,
        embed_dim: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None) or any(each is not None and len(each) != in_chans for each in (mean, std)):
            raise ValueError(
                f"mean={mean} and std={std}, expected {in_chans} numbers each, one for a channel, or neither."
            )
        self.patch_size, self.tubelet_size = patch_pair(patch_size), tubelet_size
        self.mean, self.std = mean, std
        kernel = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)  # what a checkpoint holds

    def dtype_for(self, video: Tensor) -> torch.dtype:
        """In which the product is made: autocast's, or the video's, or for uint8 the weights'."""
        device = video.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return video.dtype if video.is_floating_point() else self.proj.weight.dtype

    def layer_for(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight [D, P] and bias [D] that patches of the video are multiplied by, in the dtype of the product.

        Raises:
            TypeError: uint8 video, and no mean and std.
        """
        weight, bias = self.proj.weight, self.proj.bias
        if video.dtype == torch.uint8:
            if self.mean is None or self.std is None:
                raise TypeError("video is uint8, and the model has no mean and std to normalise it by; give it both.")
            channels = list(zip(at_least_fp32(weight).unbind(1), self.mean, self.std, strict=True))
            # Numbers, not tensors of them, which would be copied to the device and waited for.
            weight = torch.stack([x / (255 * std) for x, _, std in channels], dim=1)
            shifts = [x.sum((1, 2, 3)) * ((_MIDDLE / 255 - mean) / std) for x, mean, std in channels]
            bias = torch.stack([*shifts, *([] if bias is None else [bias])]).sum(0)
        dtype = self.dtype_for(video)
        return weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype)

    def forward(
        self, video: Tensor, idx: Tensor | None = None, *, layer: tuple[Tensor, Tensor | None] | None = None
    ) -> Tensor:
        """Embeds all patches, or some.

        Args:
            video: [B, C, T, H, W].
            idx: [B R, K] int64, the tokens to make; all of them if None.
            layer: of `layer_for`, for those who embed twice.

        Returns:
            [B, N, D], tokens in t-h-w order; or [B R, K, D].

        Raises:
            TypeError: see `layer_for`.
        """
        weight, bias = layer or self.layer_for(video)
        offset = _MIDDLE if video.dtype == torch.uint8 else 0.0
        size, tubelet, dtype = self.patch_size, self.tubelet_size, weight.dtype
        rows = patch_tokens(video, idx, patch_size=size, tubelet_size=tubelet, dtype=dtype, offset=offset)
        return F.linear(rows, weight, bias)


def sinusoid_table(num_tokens: int, width: int) -> Tensor:
    """[1, N, D] fixed position embedding: sin and cos of n / 10000^(2 floor(d/2) / D), over the flat token index."""
    position = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    even = torch.arange(width, dtype=torch.float64) // 2 * 2
    angle = position / 10000.0 ** (even / width)  # [N, D]
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]
