"""The reference video MAE, its classifier, and the checkpoint formats they read and write.

The import of this package registers the models with timm.
"""

from adamae_sampler.models.adamae import (
    AdaMAE,
    pretrain_adamae_vit_base_patch16_224,
    pretrain_adamae_vit_large_patch16_224,
    pretrain_adamae_vit_small_patch16_224,
)
from adamae_sampler.models.checkpoint import LoadReport, load_checkpoint
from adamae_sampler.models.classifier import (
    VideoClassifier,
    adamae_vit_base_patch16_224,
    adamae_vit_large_patch16_224,
    adamae_vit_small_patch16_224,
)
from adamae_sampler.models.export import save_encoder
from adamae_sampler.models.presets import PRESETS

__all__ = [
    "AdaMAE",
    "LoadReport",
    "PRESETS",
    "VideoClassifier",
    "adamae_vit_base_patch16_224",
    "adamae_vit_large_patch16_224",
    "adamae_vit_small_patch16_224",
    "load_checkpoint",
    "pretrain_adamae_vit_base_patch16_224",
    "pretrain_adamae_vit_large_patch16_224",
    "pretrain_adamae_vit_small_patch16_224",
    "save_encoder",
]
