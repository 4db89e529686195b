"""Adaptive masking for vit-pytorch's MAE, which draws its mask inside `forward`: pip install vit-pytorch.

python examples/vit_pytorch_mae.py     # a minute on two CPU cores
"""

from __future__ import annotations

import common.threads  # noqa: F401 - before torch

# isort: split
import torch
from torch import Tensor
from vit_pytorch import MAE, ViT

from adamae_sampler import AdaptiveTokenSampler, MaskSample, ops
from training.image_loop import train_on_images


class AdaptiveMAE(MAE):
    """vit-pytorch's MAE with a learned mask: `prediction, sample = mae(images)`.

    Args:
        encoder: vit-pytorch's ViT.
        decoder_dim: width of the decoder.
        masking_ratio: share of tokens to mask.
        options: further options of the decoder.
    """

    def __init__(self, *, encoder: ViT, decoder_dim: int, masking_ratio: float = 0.75, **options: int) -> None:
        super().__init__(encoder=encoder, decoder_dim=decoder_dim, masking_ratio=masking_ratio, **options)
        axes = self.to_patch.axes_lengths  # height and width of a patch
        self.patch_size = axes["p1"], axes["p2"]
        places, width = encoder.pos_embedding.shape
        self.class_tokens = encoder.cls_token.shape[0]
        # The encoder knows the number of tokens, not the shape of the grid. The sampler needs only the number.
        self.sampler = AdaptiveTokenSampler(width, (1, 1, places - self.class_tokens), masking_ratio)

    def forward(self, img: Tensor, mask: Tensor | MaskSample | None = None) -> tuple[Tensor, MaskSample]:
        """[B, C, H, W] -> prediction [B, M, P], and the sample."""
        tokens = self.patch_to_emb(self.to_patch(img))
        sample: MaskSample = self.sampler(tokens, mask=mask)
        x = ops.gather_tokens(tokens, sample.visible_idx, self.encoder.pos_embedding[self.class_tokens :])
        x = self.enc_to_dec(self.encoder.transformer(x))
        positions = self.decoder_pos_emb.weight[: tokens.shape[1]]  # the table has a spare row for a class token
        x = ops.assemble_tokens(x, self.mask_token, positions, sample, order="restore")
        prediction: Tensor = self.to_pixels(ops.gather_tokens(self.decoder(x), sample.masked_idx))
        return prediction, sample


def main(steps: int = 100) -> list[float]:
    """Trains on images of sprites; returns the reconstruction losses."""
    torch.manual_seed(0)
    vit = ViT(image_size=64, patch_size=8, num_classes=20, dim=192, depth=4, heads=3, mlp_dim=768)
    model = AdaptiveMAE(encoder=vit, decoder_dim=64, decoder_heads=4, decoder_dim_head=16)
    return train_on_images(model, model.patch_size, steps=steps)


if __name__ == "__main__":
    main()
