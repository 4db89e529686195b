"""The hosts that `patch` is tested with: small models, and a way to give each unpatched one a mask.

transformers and hiera are the real packages. The research repositories are the real code if the environment variable
ADAMAE_SAMPLER_HOSTS names a folder that holds checkouts in mae, mae_st, VideoMAE, VideoMAEv2 (mae_st needs iopath and
simplejson); otherwise models of `small_hosts.py` stand in for them.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import small_hosts
import torch
from torch import Tensor, nn

from adamae_sampler import AdaMAELoss, MaskSample
from benchmarks.steps.repositories import import_from

CHECKOUTS = os.environ.get("ADAMAE_SAMPLER_HOSTS")
layer_norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class HostCase:
    """One host.

    Attributes:
        name: the name of the host in HOSTS; a second word tells two cases of one host apart.
        make: keyword arguments -> a small model.
        shape: shape of the input without the batch.
        with_mask: (unpatched model, input, sample) -> its output for that mask.
        comparable: (output of a model, patched or not) -> the tensors that must be equal.
        mask_argument: name of the patched model's argument that takes a `MaskSample`.
        loss: (output of a patched model in training, input) -> its loss.
        own_loss: (unpatched model, input, mask ratio) -> its loss with a random mask at that ratio.
        sizes: (keyword arguments of `make`, shape of the input) of other variants to test.
    """

    name: str
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    with_mask: Callable[[Any, Tensor, MaskSample], Any]
    comparable: Callable[[Any], tuple[Tensor, ...]]
    loss: Callable[[Any, Tensor], Tensor]
    own_loss: Callable[[Any, Tensor, float], Tensor]
    mask_argument: str = "mask"
    sizes: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = field(default=())

    def inputs(self, clips: int = 2, seed: int = 0) -> Tensor:
        return structured(clips, self.shape, seed)

    def __repr__(self) -> str:
        return self.name


def structured(clips: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Clips that share an easily learned texture. Each has a square of noise, which cannot be learned."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(shape[-2]), torch.arange(shape[-1]), indexing="ij")
    x = ((row + 2 * column) * (torch.pi / 2) + 0.5).sin().expand(clips, *shape).clone()  # alike in every patch
    size = shape[-1] // 2
    for clip in range(clips):
        row, column = torch.randint(0, shape[-2] - size + 1, (2,), generator=generator).tolist()
        square = x[clip, ..., row : row + size, column : column + size]
        square.copy_(torch.randn(square.shape, generator=generator))
    return x


@contextmanager
def noise_of(sample: MaskSample):
    """Within it, torch.rand returns the noise from which MAE's argsort makes this mask, with ascending tokens."""
    order = torch.cat([sample.visible_idx, sample.masked_idx], dim=1)
    places = torch.arange(order.shape[1]).expand_as(order)
    noise = torch.zeros(order.shape).scatter_(1, order, places / order.shape[1])
    with mock.patch("torch.rand", return_value=noise):
        yield noise


def _mae_with_mask(model, imgs, sample):
    with noise_of(sample):
        return model(imgs, sample.masked_idx.shape[1] / sample.num_tokens)


def _vit_mae_with_mask(model, imgs, sample):
    with noise_of(sample) as noise:
        return model(imgs, noise=noise)


def random_sample(clips: int, tokens: int, visible: int, seed: int = 0) -> MaskSample:
    scores = torch.rand(clips, tokens, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(clips, tokens, dtype=torch.bool).scatter_(1, scores.topk(visible).indices, False)
    return MaskSample.from_mask(mask, visible)


def _num_tokens(model) -> int:
    from adamae_sampler.integrations.patching import find_host

    grid = find_host(model).host_shape(model).grid_size
    return grid[0] * grid[1] * grid[2]


def _own_mask(model, clips: int, ratio: float) -> MaskSample:
    tokens = _num_tokens(model)
    return random_sample(clips, tokens, int(tokens * (1 - ratio)), seed=int(torch.randint(1 << 30, ())))


def _patch_sizes(model):
    embed = model.encoder.patch_embed.proj
    return {"patch_size": embed.kernel_size[1], "tubelet_size": embed.kernel_size[0]}


def _videomae_own_loss(model, videos, ratio):
    sample = _own_mask(model, len(videos), ratio)
    return AdaMAELoss(**_patch_sizes(model))(model(videos, sample.mask), videos, sample).loss


def _videomae_loss(output, videos):
    prediction, sample = output
    patch = int((prediction.shape[2] / videos.shape[1] / 2) ** 0.5)
    return AdaMAELoss(patch_size=patch)(prediction, videos, sample).loss


def checkout(name: str) -> Path | None:
    path = Path(CHECKOUTS or "/nowhere") / name
    return path if CHECKOUTS and path.is_dir() else None


def make_mae(img_size=32, patch_size=4, **options):
    if not checkout("mae"):
        return small_hosts.MaskedAutoencoderViT(img_size, patch_size, **options)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "decoder_embed_dim": 16, "decoder_depth": 1}
    model = import_from(checkout("mae"), "models_mae").MaskedAutoencoderViT
    return model(img_size, patch_size, **sizes, decoder_num_heads=4, norm_layer=layer_norm, norm_pix_loss=True)


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


_MAE = {
    "with_mask": _mae_with_mask,
    "comparable": lambda output: output,
    "loss": lambda output, _: output[0],
    "own_loss": lambda model, x, ratio: model(x, ratio)[0],
}
_HIERA = {
    **_MAE,
    "with_mask": lambda model, x, sample: model(x, mask=~sample.mask),
}
_VIDEOMAE = {
    "with_mask": lambda model, x, sample: model(x, sample.mask),
    "comparable": lambda output: (output[0] if isinstance(output, tuple) else output,),
    "loss": _videomae_loss,
    "own_loss": _videomae_own_loss,
}
_HF = {"comparable": lambda output: tuple(output.values()), "loss": lambda output, _: output.loss}

CASES = (
    HostCase(
        "hf_videomae",
        make_hf_videomae,
        (8, 3, 32, 32),
        with_mask=lambda model, x, sample: model(x, bool_masked_pos=sample.mask),
        own_loss=lambda model, x, ratio: model(x, bool_masked_pos=_own_mask(model, len(x), ratio).mask).loss,
        mask_argument="bool_masked_pos",
        sizes=(
            ({"num_frames": 16}, (16, 3, 32, 32)),
            ({"num_frames": 32}, (32, 3, 32, 32)),
            ({"image_size": (16, 40)}, (8, 3, 16, 40)),
            ({"num_channels": 1}, (8, 1, 32, 32)),
            ({"num_channels": 4}, (8, 4, 32, 32)),
            ({"norm_pix_loss": False}, (8, 3, 32, 32)),
        ),
        **_HF,
    ),
    HostCase(
        "hf_vit_mae",
        make_hf_vit_mae,
        (3, 32, 32),
        with_mask=_vit_mae_with_mask,
        own_loss=lambda model, x, ratio: model(x).loss,
        sizes=(
            ({"num_channels": 1}, (1, 32, 32)),
            ({"num_channels": 4}, (4, 32, 32)),
            ({"norm_pix_loss": False}, (3, 32, 32)),
        ),
        **_HF,
    ),
    HostCase("mae", make_mae, (3, 32, 32), **_MAE),
    HostCase(
        "mae_st",
        make_mae_st,
        (3, 8, 32, 32),
        sizes=(
            ({"frames": 16, "pred_t_dim": 8}, (3, 16, 32, 32)),
            ({"frames": 32, "pred_t_dim": 16}, (3, 32, 32, 32)),
            ({"frames": 8, "pred_t_dim": 8}, (3, 8, 32, 32)),
            ({"cls_embed": False, "sep_pos_embed": False}, (3, 8, 32, 32)),
        ),
        **_MAE,
    ),
    HostCase(
        "videomae",
        make_videomae,
        (3, 16, 32, 32),
        sizes=(({"img_size": (16, 40)}, (3, 16, 16, 40)), ({"checkpointing": True}, (3, 16, 32, 32))),
        **_VIDEOMAE,
    ),
    HostCase(
        "videomae_v2",
        make_videomae_v2,
        (3, 16, 32, 32),
        sizes=(
            ({"frames": 8}, (3, 8, 32, 32)),
            ({"frames": 32}, (3, 32, 32, 32)),
            ({"img_size": (16, 40)}, (3, 16, 16, 40)),
            ({"checkpointing": True}, (3, 16, 32, 32)),
        ),
        **_VIDEOMAE,
    ),
    HostCase(
        "hiera",
        make_hiera,
        (3, 128, 128),
        sizes=(
            ({"input_size": (64, 160)}, (3, 64, 160)),
            ({"in_chans": 1}, (1, 128, 128)),
            ({"in_chans": 4}, (4, 128, 128)),
        ),
        **_HIERA,
    ),
    HostCase(
        "hiera video",
        make_hiera_video,
        (3, 8, 64, 64),
        sizes=(
            ({"input_size": (16, 64, 64)}, (3, 16, 64, 64)),
            ({"input_size": (32, 64, 96)}, (3, 32, 64, 96)),
            ({"in_chans": 4}, (4, 8, 64, 64)),
        ),
        **_HIERA,
    ),
)
