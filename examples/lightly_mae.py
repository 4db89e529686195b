"""Adaptive masking with lightly's MAE modules, which take the indices of tokens: pip install lightly.

python examples/lightly_mae.py     # a minute on two CPU cores
"""

from __future__ import annotations

import common.threads  # noqa: F401 - before torch

# isort: split
import timm
import torch
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adamae_sampler import AdaptiveTokenSampler, MaskSample
from training.image_loop import train_on_images


class AdaptiveLightlyMAE(nn.Module):
    """A masked autoencoder of lightly's parts. Comments mark the lines that adaptive masking adds.

    Args:
        vit: timm's vision transformer, with a class token.
        decoder_dim: width of the decoder.
        mask_ratio: share of tokens to mask.
    """

    def __init__(self, vit: VisionTransformer, decoder_dim: int = 64, mask_ratio: float = 0.75) -> None:
        super().__init__()
        embed = vit.patch_embed
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(embed.num_patches, decoder_dim, depth=1, num_heads=4)
        self.head = nn.Linear(decoder_dim, embed.proj.in_channels * embed.patch_size[0] ** 2)
        self.sampler = AdaptiveTokenSampler(vit.embed_dim, (1, *embed.grid_size), mask_ratio)  # added

    def forward(self, images: Tensor) -> tuple[Tensor, MaskSample]:
        """[B, C, H, W] -> prediction [B, M, P], and the sample."""
        sample: MaskSample = self.sampler(self.backbone.images_to_tokens(images))  # in place of random_token_mask
        idx_keep = nn.functional.pad(sample.visible_idx + 1, (1, 0))  # lightly's token 0 is the class token
        idx_mask = sample.masked_idx + 1
        x = self.decoder_embed(self.backbone.encode(images, idx_keep=idx_keep))
        full = x.new_zeros(x.shape[0], self.decoder.sequence_length, x.shape[2])
        x = self.decoder(utils.set_at_index(full, idx_keep, x), idx_mask=idx_mask)
        prediction: Tensor = self.head(utils.get_at_index(x, idx_mask))
        return prediction, sample


def main(steps: int = 100) -> list[float]:
    """Trains on images of sprites; returns the reconstruction losses."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4)
    model = AdaptiveLightlyMAE(vit)
    return train_on_images(model, patch_size=8, steps=steps)


if __name__ == "__main__":
    main()
