"""AdaMAE: the reference masked autoencoder for video (supplement, Table 5), on timm's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from adamae_sampler.losses import HeadInputs
from adamae_sampler.mask import MaskSample, target_idx
from adamae_sampler.models.build import build_variant
from adamae_sampler.models.encoder import Encoder, VideoSize, fill_constants
from adamae_sampler.models.layers import sinusoid_table
from adamae_sampler.models.presets import with_preset
from adamae_sampler.networks import Network, init_linear_layers
from adamae_sampler.ops import assemble_tokens
from adamae_sampler.ops.patch_format import PatchSize
from adamae_sampler.ops.thumbnail import shrink, shrunk
from adamae_sampler.positions import GridSize, resample
from adamae_sampler.sampler import Masking, Ramp, TokenSampler, draw_decoded, make_sampler
from adamae_sampler.transformer import LayerNorm, Transformer


class Decoder(nn.Module):
    """A transformer over all tokens, then a linear layer from the masked tokens to pixels."""

    def __init__(self, width: int, depth: int, num_heads: int, patch_values: int) -> None:
        super().__init__()
        self.blocks = Transformer(depth, width, num_heads)
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, patch_values)

    def features(self, x: Tensor, num_masked: int) -> Tensor:
        """[B, K + M, D], the masked tokens last -> the input of the head [B, M, D]."""
        normed: Tensor = self.blocks(x, self.norm, last=num_masked)
        return normed

    def forward(self, x: Tensor, num_masked: int) -> Tensor:
        """[B, K + M, D], the masked tokens last -> their pixels [B, M, P]."""
        return self.head(self.features(x, num_masked))


class AdaMAE(nn.Module):
    """Video masked autoencoder with a learned mask (Algorithm 2).

    The defaults are those of ViT-B, with the method of the paper. Arguments have timm's and VideoMAE's names. The
    models in timm's registry also take `preset`: "exact", or "fast", which costs less (see `models.PRESETS`).

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
        mask_ratio: share of tokens to mask. None means 0.95, or the ratio of a given sampler.
        masking: a name of `adamae_sampler.sampler.MASKINGS`, or a `TokenSampler`. Of the named ones "motion" takes
            pixels as its source.
        score_network: the score network of "adaptive" and "hard", see `AdaptiveTokenSampler`.
        temperature: see `AdaptiveTokenSampler`.
        exploration: see `AdaptiveTokenSampler`.
        num_masks: R, masks of each clip, drawn from one p. The batch is R times as large from the encoder on.
            Predictions and the sample have B R rows, clip by clip.
        sample_from: the input of the sampler: "tokens", or "pixels", which are patches shrunk to 4 x 4. With "pixels"
            only the visible tokens are embedded. This saves time with fixed masks too.
        decode_ratio: share of the masked tokens that is decoded in training, drawn uniformly. Evaluation decodes all.
        mean: the channel means of uint8 video, as a share of 255. With three channels None means ImageNet's.
        std: the standard deviations that go with `mean`.
        dynamic_img_size: whether clips of other sizes and lengths are taken, if patches divide them (timm's name).
            Position tables are resampled, and the number of visible tokens follows from the mask ratio.
        fused_head: in training return `HeadInputs` instead of the prediction. `AdaMAELoss(fused_head=True)` takes it
            and computes the last layer and the error together.
        score_depth: blocks of the score network; None for 1. The paper's ablation has 2, with a `score_width` of 384.
        score_width: width of these blocks; None for `embed_dim`, or 192 for "pooled".
        target_ratio: see `AdaptiveTokenSampler`.

    Raises:
        ValueError: patches do not divide the clip, or heads the width; a number is out of range; the masking is
            unknown; options do not fit the masking; or the sampler is for another grid.
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
        mask_ratio: float | None = None,
        masking: Masking | TokenSampler = "adaptive",
        score_network: Network | nn.Module = "mha",
        temperature: float = 1.0,
        exploration: float | Ramp = 0.0,
        num_masks: int = 1,
        sample_from: Literal["tokens", "pixels"] = "tokens",
        decode_ratio: float = 1.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        fused_head: bool = False,
        dynamic_img_size: bool = False,
        score_depth: int | None = None,
        score_width: int | None = None,
        target_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        if sample_from not in ("tokens", "pixels"):
            raise ValueError(f"sample_from={sample_from!r}, expected 'tokens' or 'pixels'.")
        if not 0 < decode_ratio <= 1:
            raise ValueError(f"decode_ratio={decode_ratio}, expected a share of the masked tokens above 0, 1 for all.")
        if target_ratio and decode_ratio < 1:
            raise ValueError(
                f"decode_ratio={decode_ratio} has no effect with target_ratio={target_ratio}: the targets are what is "
                "decoded. Leave one of them out."
            )
        self.sample_from = sample_from
        self.decode_ratio = decode_ratio
        self.fused_head = fused_head
        self.dynamic_img_size = dynamic_img_size
        self.size = VideoSize.of(img_size, num_frames, patch_size, tubelet_size, in_chans, mean, std)
        num_tokens = self.size.num_tokens

        self.encoder = Encoder(self.size, embed_dim, depth, num_heads)
        self.encoder_to_decoder = nn.Linear(embed_dim, decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", sinusoid_table(num_tokens, decoder_embed_dim), persistent=False)
        self.decoder = Decoder(decoder_embed_dim, decoder_depth, decoder_num_heads, self.size.patch_values)
        self.init_weights()
        # Last, so that initialisation leaves the weights of a given sampler alone.
        width = embed_dim if sample_from == "tokens" else shrunk(self.size.patches).pixels * in_chans
        learned = {
            "score_network": score_network,
            "score_depth": score_depth,
            "score_width": score_width,
            "temperature": temperature,
            "exploration": exploration,
            "target_ratio": target_ratio,
        }
        self.sampler = make_sampler(masking, width, self.size.grid, mask_ratio, num_masks, learned)

    def init_weights(self) -> None:
        """Fills the weights of encoder, decoder and mask token as the official code does (timm's name).

        `encoder_to_decoder` keeps nn.Linear's own initialisation there.
        """
        init_linear_layers(self.encoder)
        init_linear_layers(self.decoder)
        trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(
        self,
        video: Tensor,
        mask: Tensor | MaskSample | None = None,
        generator: torch.Generator | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor | HeadInputs, MaskSample]:
        """Predicts the masked part of each clip.

        Args:
            video: [B, C, T, H, W], uint8 pixels, or floating point, normalised as you wish. uint8 video needs no
                fp32 copy on a GPU.
            mask: a mask to use instead of a draw, see `TokenSampler.forward`. log_probs still come from the sampler.
            generator: source of the draw's randomness.
            valid: [B, N] bool, the tokens that count, see `TokenSampler.forward`.

        Returns:
            The prediction [B, M, P], in the order of `sample.target_idx`, values laid out (t p1 p2 c); and the sample.

        Raises:
            TypeError: the video is neither uint8 nor floating point.
            ValueError: the video has another size than the model, or the mask does not fit the video.
        """
        grid = self.size.grid_of(video, self.dynamic_img_size)
        how = {"mask": mask, "generator": generator, "valid": valid}
        x, sample = self._encode(video, grid, how)  # [B, K, D], B times num_masks
        if self.training and self.decode_ratio < 1 and sample.decoded_idx is None:
            num_masked = sample.masked_idx.shape[1]
            sample = draw_decoded(sample, max(1, int(num_masked * self.decode_ratio + 1e-9)), generator)
        x = self.encoder_to_decoder(x)  # [B, K, decoder D]
        positions = resample(self.decoder_pos_embed, self.size.grid, grid)
        x = assemble_tokens(x, self.mask_token, positions, sample)  # [B, K + M, decoder D]
        num_masked = target_idx(sample).shape[1]
        if self.training and self.fused_head:
            # Copies: FSDP2 takes parameters back after the forward pass, and DDP counts returned parameters as unused.
            head = self.decoder.head
            return HeadInputs(self.decoder.features(x, num_masked), head.weight.clone(), head.bias.clone()), sample
        prediction: Tensor = self.decoder(x, num_masked)  # [B, M, P]
        return prediction, sample

    def _encode(self, video: Tensor, grid: GridSize, how: Mapping[str, Any]) -> tuple[Tensor, MaskSample]:
        """The encoded visible tokens [B, K, D], and the mask. `how` goes to the sampler."""
        embed = self.encoder.patch_embed
        layer = embed.layer_for(video)
        if self.sample_from == "tokens":
            tokens = embed(video, layer=layer)  # [B, N, D]
            sample: MaskSample = self.sampler(tokens, video=video, grid_size=grid, **how)
            if sample.log_probs is None:
                return self.encoder(tokens, sample.visible_idx, grid), sample
        else:
            sample = self.draw_mask(video, **how)
        # Where the scores give the tokens a gradient, the visible tokens are embedded again. That costs a few rows of a
        # matrix product. A gather would cost more: its gradient has a row for every token, and is summed over them all.
        visible = embed(video, sample.visible_idx, layer=layer)
        return self.encoder.of_visible(visible, sample.visible_idx, grid), sample

    def draw_mask(
        self,
        video: Tensor,
        mask: Tensor | MaskSample | None = None,
        generator: torch.Generator | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """A mask for each clip, as `forward` draws it. Use it for pictures, and for `forward(video, mask=...)`."""
        tokens, grid = self.sampler_tokens(video), self.size.grid_of(video, self.dynamic_img_size)
        sample: MaskSample = self.sampler(
            tokens, video=video, mask=mask, generator=generator, grid_size=grid, valid=valid
        )
        return sample

    def sampler_tokens(self, video: Tensor) -> Tensor:
        """The tokens of a video that the sampler looks at, [B, N, D]; with `sample_from="pixels"` shrunk patches."""
        self.size.grid_of(video, self.dynamic_img_size)
        embed = self.encoder.patch_embed
        if self.sample_from == "pixels":
            return shrink(video, self.size.patches, embed.dtype_for(video))
        tokens: Tensor = embed(video)
        return tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations of encoder and decoder in the backward pass. The draw is never recomputed."""
        self.encoder.blocks.grad_checkpointing = enable
        self.decoder.blocks.grad_checkpointing = enable

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fills the buffers that checkpoints lack, after `to_empty` of a model on the meta device (timm's name)."""
        self.decoder_pos_embed.copy_(sinusoid_table(*self.decoder_pos_embed.shape[1:]))
        fill_constants(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with several axes that need no weight decay, for timm."""
        return {"mask_token"}  # positions of the score network decay, as in the official code


@register_model
def pretrain_adamae_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-S/16 for 16x224x224 clips; takes any argument of `AdaMAE`, and a `preset` (see `PRESETS`)."""
    size = {"embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 192, "decoder_num_heads": 3}
    return build_variant(AdaMAE, "pretrain_adamae_vit_small_patch16_224", pretrained, with_preset(kwargs), **size)


@register_model
def pretrain_adamae_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-B/16 for 16x224x224 clips, the paper's; takes any argument of `AdaMAE`, and a `preset` (see `PRESETS`)."""
    return build_variant(AdaMAE, "pretrain_adamae_vit_base_patch16_224", pretrained, with_preset(kwargs))


@register_model
def pretrain_adamae_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> AdaMAE:
    """ViT-L/16 for 16x224x224 clips; takes any argument of `AdaMAE`, and a `preset` (see `PRESETS`)."""
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_embed_dim": 512, "decoder_num_heads": 8}
    return build_variant(AdaMAE, "pretrain_adamae_vit_large_patch16_224", pretrained, with_preset(kwargs), **size)
