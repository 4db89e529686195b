"""The video classifier for fine-tuning a pre-trained encoder: mean pooling, fc_norm, a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from adamae_sampler.models.build import build_variant
from adamae_sampler.models.encoder import Encoder, VideoSize, fill_constants
from adamae_sampler.ops.patch_format import PatchSize
from adamae_sampler.transformer import LayerNorm


class VideoClassifier(nn.Module):
    """ViT over all tokens of a clip, mean-pooled (VideoMAE's and the paper's fine-tuning model).

    The encoder's weights have the names of `AdaMAE`'s encoder. `fc_norm` replaces the encoder's last norm. The defaults
    are ViT-B's.

    Args:
        img_size: height and width of a frame in pixels, one number or a pair.
        num_frames: frames of a clip.
        patch_size: height and width of a patch in pixels, one number or a pair.
        tubelet_size: frames of a patch.
        in_chans: channels of the video.
        num_classes: outputs of the head. 0 leaves the head out, and forward returns pooled features.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        drop_rate: dropout before the head.
        head_init_scale: factor on the head's initial weights. With a small factor the encoder changes little at first.
        encoder_norm: whether to keep the encoder's own last norm, for features of a frozen encoder.
        mean: the channel means of uint8 video, see `AdaMAE`.
        std: the standard deviations that go with `mean`.

    Raises:
        ValueError: patches do not divide the clip, or heads the width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        patch_size: PatchSize = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 400,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        head_init_scale: float = 1e-3,
        encoder_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.size = VideoSize.of(img_size, num_frames, patch_size, tubelet_size, in_chans, mean, std)
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.encoder = Encoder(self.size, embed_dim, depth, num_heads, drop_path_rate, encoder_norm)
        self.fc_norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():  # as the official code, whose autoencoder has Xavier's weights
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W], uint8 pixels or normalised floating point -> logits [B, num_classes].

        Raises:
            TypeError: the video is neither uint8 nor floating point.
            ValueError: the video has another size than the model.
        """
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> encoded tokens [B, N, D]."""
        self.size.check(video)
        tokens: Tensor = self.encoder(self.encoder.patch_embed(video))
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Encoded tokens [B, N, D] -> logits [B, num_classes]; with `pre_logits`, the head's input [B, D]."""
        pooled: Tensor = self.head_drop(self.fc_norm(tokens.mean(1)))
        return pooled if pre_logits else self.head(pooled)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass."""
        self.encoder.blocks.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups for layer-wise learning-rate decay. Parameters in no group (fc_norm, head) come last."""
        return {
            "stem": r"^encoder\.patch_embed",
            "blocks": r"^encoder\.blocks" if coarse else [(r"^encoder\.blocks\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters with several axes that need no weight decay: none."""
        return set()

    def init_non_persistent_buffers(self) -> None:
        """Fills the buffers that checkpoints lack, after `to_empty` of a model on the meta device (timm's name)."""
        fill_constants(self)


@register_model
def adamae_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoClassifier:
    """ViT-S/16 classifier of 16x224x224 clips; any argument of `VideoClassifier` may be given."""
    size = {"embed_dim": 384, "num_heads": 6}
    return build_variant(VideoClassifier, "adamae_vit_small_patch16_224", pretrained, kwargs, **size)


@register_model
def adamae_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoClassifier:
    """The paper's ViT-B/16 classifier of 16x224x224 clips; any argument of `VideoClassifier` may be given."""
    return build_variant(VideoClassifier, "adamae_vit_base_patch16_224", pretrained, kwargs)


@register_model
def adamae_vit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoClassifier:
    """ViT-L/16 classifier of 16x224x224 clips; any argument of `VideoClassifier` may be given."""
    size = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return build_variant(VideoClassifier, "adamae_vit_large_patch16_224", pretrained, kwargs, **size)
