"""AdaMAE: the reference masked autoencoder for video (supplement, Table 5), on timm's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from adamae_sampler.mask import MaskSample
from adamae_sampler.models.build import build_variant
from adamae_sampler.models.encoder import Encoder, VideoSize, fill_constants
from adamae_sampler.models.layers import LayerNorm, Transformer, sinusoid_table
from adamae_sampler.networks import init_linear_layers
from adamae_sampler.ops import assemble_tokens
from adamae_sampler.ops.patches import PatchSize
from adamae_sampler.sampler import (
    AdaptiveTokenSampler,
    FrameTokenSampler,
    GridSize,
    RandomTokenSampler,
    TokenSampler,
    TubeTokenSampler,
)

Masking = Literal["adaptive", "random", "tube", "frame"]


class Decoder(nn.Module):
    """Transformer over all tokens, then a linear layer from the masked ones to pixels."""

    def __init__(self, width: int, depth: int, num_heads: int, patch_values: int) -> None:
        super().__init__()
        self.blocks = Transformer(depth, width, num_heads)
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, patch_values)

    def forward(self, x: Tensor, num_masked: int) -> Tensor:
        """[B, N, D], the masked tokens last -> their pixels [B, M, P]."""
        x = self.blocks(x)
        return self.head(self.norm(x[:, -num_masked:]))


class AdaMAE(nn.Module):
    """Video masked autoencoder with a learned mask (Algorithm 2).

    The defaults are ViT-B's. Arguments have timm's and VideoMAE's names.

    Args:
        img_size: height and width of a frame in pixels, one number or a pair.
        num_frames: frames of a clip.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        in_chans: channels of the video.
        embed_dim: width of the encoder.
        depth: blocks of the encoder.
        num_heads: attention heads of the encoder.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        mask_ratio: share of tokens to mask.
        masking: "adaptive", "random", "tube", "frame", or a `TokenSampler` of your own, which then has the ratio.

    Raises:
        ValueError: sizes that do not divide, a ratio out of range, an unknown masking, or a sampler whose grid
            is not the model's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        patch_size: PatchSize = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 384,
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
        mask_ratio: float = 0.95,
        masking: Masking | TokenSampler = "adaptive",
    ) -> None:
        super().__init__()
        self.size = VideoSize.of(img_size, num_frames, patch_size, tubelet_size, in_chans)
        num_tokens = self.size.num_tokens

        self.encoder = Encoder(self.size, embed_dim, depth, num_heads)
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", sinusoid_table(num_tokens, decoder_embed_dim), persistent=False)
        self.decoder = Decoder(decoder_embed_dim, decoder_depth, decoder_num_heads, self.size.patch_values)
        init_linear_layers(self)
        trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # Last, because a sampler given from outside keeps the weights it came with.
        self.sampler = _make_sampler(masking, embed_dim, self.size.grid, mask_ratio)

    def forward(
        self,
        video: Tensor,
        mask: Tensor | MaskSample | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, MaskSample]:
        """Predicts the masked part of each clip.

        Args:
            video: [B, C, T, H, W], floating point, normalised as you wish.
            mask: a mask in place of a draw, see `TokenSampler.forward`; log_probs are still the sampler's.
            generator: source of the draw's randomness.

        Returns:
            prediction [B, M, P], in the order of `sample.masked_idx`, values laid out (t p1 p2 c); and the sample.

        Raises:
            TypeError: integer video.
            ValueError: a video of another size than the model's, or a mask that does not fit it.
        """
        self.size.check(video)
        tokens = self.encoder.patch_embed(video)  # [B, N, D]
        sample: MaskSample = self.sampler(tokens, mask=mask, generator=generator)
        x = self.encoder(tokens, sample.visible_idx)  # [B, K, D]
        x = self.encoder_to_decoder(x)  # [B, K, decoder D]
        x = assemble_tokens(x, self.mask_token, self.decoder_pos_embed, sample)  # [B, N, decoder D]
        prediction: Tensor = self.decoder(x, sample.masked_idx.shape[1])  # [B, M, P]
        return prediction, sample

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of encoder and decoder in the backward pass. The draw is never recomputed."""
        self.encoder.blocks.grad_checkpointing = enable
        self.decoder.blocks.grad_checkpointing = enable

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fills what no checkpoint holds, after `to_empty` of a model made on the meta device (timm's convention)."""
        self.decoder_pos_embed.copy_(sinusoid_table(*self.decoder_pos_embed.shape[1:]))
        fill_constants(self)

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one axis that weight decay should still leave alone, as timm asks for them."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("mask_token", "pos_embed")}


def _make_sampler(
    masking: Masking | TokenSampler, embed_dim: int, grid_size: GridSize, mask_ratio: float
) -> TokenSampler:
    if isinstance(masking, TokenSampler):
        if masking.grid_size != grid_size:
            raise ValueError(
                f"the sampler's grid_size is {masking.grid_size}, the model's {grid_size}; build it with the model's."
            )
        return masking
    if masking == "adaptive":
        return AdaptiveTokenSampler(embed_dim, grid_size, mask_ratio)
    fixed: dict[str, Callable[[GridSize, float], TokenSampler]] = {
        "random": RandomTokenSampler,
        "tube": TubeTokenSampler,
        "frame": FrameTokenSampler,
    }
    if masking not in fixed:
        raise ValueError(f"masking={masking!r}, expected 'adaptive', {', '.join(map(repr, fixed))} or a TokenSampler.")
    return fixed[masking](grid_size, mask_ratio)


@register_model
def pretrain_adamae_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-S/16 for 16x224x224 clips; any argument of `AdaMAE` may be given."""
    size = {"embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 192, "decoder_num_heads": 3}
    return build_variant(AdaMAE, "pretrain_adamae_vit_small_patch16_224", pretrained, kwargs, **size)


@register_model
def pretrain_adamae_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-B/16 for 16x224x224 clips, the model of the paper; any argument of `AdaMAE` may be given."""
    return build_variant(AdaMAE, "pretrain_adamae_vit_base_patch16_224", pretrained, kwargs)


@register_model
def pretrain_adamae_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-L/16 for 16x224x224 clips; any argument of `AdaMAE` may be given."""
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_embed_dim": 512, "decoder_num_heads": 8}
    return build_variant(AdaMAE, "pretrain_adamae_vit_large_patch16_224", pretrained, kwargs, **size)
