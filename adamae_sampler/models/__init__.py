"""The reference video MAE, and the formats it reads and writes. Importing this registers the models with timm."""

from adamae_sampler.models.adamae import (
    AdaMAE,
    pretrain_adamae_vit_base_patch16_224,
    pretrain_adamae_vit_large_patch16_224,
    pretrain_adamae_vit_small_patch16_224,
)
from adamae_sampler.models.checkpoint import LoadReport, load_checkpoint
from adamae_sampler.models.export import save_encoder

__all__ = [
    "AdaMAE",
    "LoadReport",
    "load_checkpoint",
    "pretrain_adamae_vit_base_patch16_224",
    "pretrain_adamae_vit_large_patch16_224",
    "pretrain_adamae_vit_small_patch16_224",
    "save_encoder",
]
