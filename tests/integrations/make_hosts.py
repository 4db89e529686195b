"""Small models of the hosts that `patch` is tested with.

transformers, hiera, MONAI, terratorch and stable-pretraining are the real packages. The research repositories are the real code if the environment variable
ADAMAE_SAMPLER_HOSTS names a folder that holds checkouts in mae, mae_st, VideoMAE, VideoMAEv2, AudioMAE, pixio (mae_st needs iopath and
simplejson); otherwise models of `small_hosts.py` stand in for them.
"""

import importlib
import importlib.util
import logging
import os
import sys
import types
from functools import cache, partial
from pathlib import Path

import pytest
import small_hosts
import torch
from torch import nn

from benchmarks.steps.repositories import import_from

CHECKOUTS = os.environ.get("ADAMAE_SAMPLER_HOSTS")
layer_norm = partial(nn.LayerNorm, eps=1e-6)


def checkout(name: str) -> Path | None:
    path = Path(CHECKOUTS or "/nowhere") / name
    return path if CHECKOUTS and path.is_dir() else None


def make_mae(img_size=32, patch_size=4, **options):
    if not checkout("mae"):
        return small_hosts.MaskedAutoencoderViT(img_size, patch_size, **options)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16, "decoder_depth": 1}
    model = import_from(checkout("mae"), "models_mae").MaskedAutoencoderViT
    return model(img_size, patch_size, **sizes, decoder_num_heads=4, norm_layer=layer_norm, norm_pix_loss=True)


def make_audiomae(mask_2d=False):
    if not checkout("AudioMAE"):
        return small_hosts.AudioMaskedAutoencoderViT(mask_2d=mask_2d)
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self: self  # its forward moves a zero to the GPU
    module = import_from(checkout("AudioMAE"), "models_mae")
    sys.modules["audiomae"] = module  # pickle would find mae's module under the name of this one
    model = module.MaskedAutoencoderViT
    model.__module__ = "audiomae"
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16, "decoder_depth": 1}
    audio = {"img_size": (256, 32), "patch_size": 4, "in_chans": 1, "audio_exp": True, "mask_2d": mask_2d}
    return model(**sizes, **audio, decoder_num_heads=4, norm_pix_loss=True, norm_layer=layer_norm)


def make_pixio(mask_grid=2):
    if not checkout("pixio"):
        return small_hosts.PixioViT(mask_grid=mask_grid)
    model = import_from(checkout("pixio") / "pretraining", "models_pixio").PixioViT
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mask_grid": mask_grid}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4}
    return model(**sizes, **decoder, norm_layer=layer_norm)


def make_mae_st(frames=8, pred_t_dim=4, **options):
    if not checkout("mae_st"):
        return small_hosts.VideoMaskedAutoencoderViT(frames=frames, pred_t_dim=pred_t_dim)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16, "decoder_depth": 1}
    model = import_from(checkout("mae_st").parent, "mae_st.models_mae").MaskedAutoencoderViT
    video = {"img_size": 32, "patch_size": 8, "num_frames": frames, "t_patch_size": 2, "pred_t_dim": pred_t_dim}
    options = {"cls_embed": True, "sep_pos_embed": True, "norm_pix_loss": True, **options}
    return model(**sizes, **video, **options, decoder_num_heads=4, norm_layer=layer_norm)


def _make_pretrain(folder, module, img_size=32, patch_size=8, in_chans=3, **options):
    sizes = {"encoder_embed_dim": 32, "encoder_depth": 2, "encoder_num_heads": 4, "encoder_in_chans": in_chans}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4}
    return import_from(checkout(folder), module).PretrainVisionTransformer(
        img_size,
        patch_size,
        **sizes,
        **decoder,
        decoder_num_classes=2 * 3 * patch_size**2,
        qkv_bias=True,
        norm_layer=layer_norm,
        **options,
    )


def make_videomae(checkpointing=False, **options):
    """A model for 16 frames, the only number that VideoMAE's encoder supports."""
    if not checkout("VideoMAE"):
        return small_hosts.PretrainVisionTransformer(frames=16, checkpointing=checkpointing, **options)
    return _make_pretrain("VideoMAE", "modeling_pretrain", use_checkpoint=checkpointing, **options)


def make_videomae_v2(frames=16, checkpointing=False, **options):
    if not checkout("VideoMAEv2"):
        return small_hosts.PretrainVisionTransformerV2(frames=frames, checkpointing=checkpointing, **options)
    return _make_pretrain("VideoMAEv2", "models.modeling_pretrain", all_frames=frames, with_cp=checkpointing, **options)


def make_hf_videomae(**options):
    transformers = pytest.importorskip("transformers")
    config = {
        "image_size": 32, "patch_size": 8, "num_frames": 8, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 64, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 32, "use_mean_pooling": False, **options,
    }  # fmt: skip
    return transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**config))


def make_hf_vit_mae(**options):
    transformers = pytest.importorskip("transformers")
    config = {
        "image_size": 32, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 32, "mask_ratio": 0.75, "norm_pix_loss": True,
        **options,
    }  # fmt: skip
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**config))


def make_hf_hiera(**options):
    transformers = pytest.importorskip("transformers")
    config = {
        "embed_dim": 16, "image_size": [128, 128], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2, "num_query_pool": 2, **options,
    }  # fmt: skip
    return transformers.HieraForPreTraining(transformers.HieraConfig(**config))


def make_hiera(**options):
    hiera = pytest.importorskip("hiera.hiera_mae")
    sizes = {"input_size": (128, 128), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "q_pool": 2}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return hiera.MaskedAutoencoderHiera(**{**sizes, **decoder, **options})


def make_hiera_video(**options):
    video = {
        "input_size": (8, 64, 64), "q_stride": (1, 2, 2), "mask_unit_size": (1, 8, 8), "patch_kernel": (3, 7, 7),
        "patch_stride": (2, 4, 4), "patch_padding": (1, 3, 3), "sep_pos_embed": True,
    }  # fmt: skip
    return make_hiera(**{**video, **options})


def make_monai(**options):
    nets = pytest.importorskip("monai.networks.nets")
    sizes = {"in_channels": 1, "img_size": (16, 32, 16), "patch_size": (4, 8, 8), "hidden_size": 48, "mlp_dim": 64}
    depth = {"num_layers": 2, "num_heads": 4, "decoder_num_layers": 1, "decoder_num_heads": 4}
    decoder = {"decoder_hidden_size": 24, "decoder_mlp_dim": 48}
    return nets.MaskedAutoEncoderViT(**{**sizes, **depth, **decoder, **options})


def make_prithvi(**options):
    sizes = {"img_size": 32, "patch_size": (1, 8, 8), "num_frames": 4, "in_chans": 6, "embed_dim": 32, "depth": 2}
    decoder = {"num_heads": 4, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4}
    return prithvi_module().PrithviMAE(**{**sizes, **decoder, "norm_pix_loss": True, **options})


@cache
def prithvi_module():
    """terratorch's file alone, which needs none of the package's many dependencies."""
    package = importlib.util.find_spec("terratorch")
    if package is None:
        pytest.skip("needs PrithviMAE: pip install --no-deps terratorch")
    file = Path(package.submodule_search_locations[0]) / "models" / "backbones" / "prithvi_mae.py"
    spec = importlib.util.spec_from_file_location("prithvi_mae", file)
    sys.modules["prithvi_mae"] = module = importlib.util.module_from_spec(spec)  # pickle looks there
    spec.loader.exec_module(module)
    return module


def make_stable_pretraining(vit=(), **options):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    return stable_pretraining_module().MAE(VisionTransformer(**{**sizes, **dict(vit)}), **{**decoder, **options})


@cache
def stable_pretraining_module():
    """The library's file of its MAE, and those that this one needs, without the package's many dependencies.

    The package itself patches Lightning when it is imported. Here its folders are empty packages, whose modules are the
    library's own files.
    """
    package = importlib.util.find_spec("stable_pretraining")
    if package is None:
        pytest.skip("needs stable-pretraining: pip install --no-deps stable-pretraining")
    (folder,) = package.submodule_search_locations
    logger = types.ModuleType("loguru")
    logger.logger = logging.getLogger("stable_pretraining")
    sys.modules.setdefault("loguru", logger)
    for name in ("", ".backbone", ".losses", ".data", ".methods"):
        module = sys.modules[f"stable_pretraining{name}"] = types.ModuleType(f"stable_pretraining{name}")
        module.__path__ = [str(Path(folder, *name.split(".")))]
    load = importlib.import_module
    sys.modules["stable_pretraining"].Module = torch.nn.Module  # a LightningModule, for its training step alone
    backbone = sys.modules["stable_pretraining.backbone"]
    vit, masking = load("stable_pretraining.backbone.vit"), load("stable_pretraining.backbone.patch_masking")
    backbone.MAEDecoder, backbone.MaskedEncoder, backbone.PatchMasking = (
        vit.MAEDecoder, vit.MaskedEncoder, masking.PatchMasking
    )  # fmt: skip
    sys.modules["stable_pretraining.losses"].MAELoss = load("stable_pretraining.losses.reconstruction").MAELoss
    return load("stable_pretraining.methods.mae")
