"""The hosts that `patch` is tested with, and a way to give each unpatched one a mask."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from make_hosts import (
    CHECKOUTS,
    checkout,
    import_from,
    make_audiomae,
    make_hf_hiera,
    make_hf_videomae,
    make_hf_vit_mae,
    make_hiera,
    make_hiera_video,
    make_mae,
    make_mae_st,
    make_monai,
    make_pixio,
    make_prithvi,
    make_videomae,
    make_videomae_v2,
)
from torch import Tensor, nn

from adamae_sampler import AdaMAELoss, MaskSample

__all__ = [
    "AUDIO",
    "CASES",
    "CHECKOUTS",
    "HostCase",
    "checkout",
    "make_audiomae",
    "make_pixio",
    "import_from",
    "make_hf_hiera",
    "make_hf_videomae",
    "make_hf_vit_mae",
    "make_hiera",
    "make_hiera_video",
    "make_mae",
    "make_mae_st",
    "make_monai",
    "make_prithvi",
    "make_videomae",
    "make_videomae_v2",
    "noise_of",
    "random_sample",
    "structured",
]


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
        return model(imgs, mask_ratio=sample.masked_idx.shape[1] / sample.num_tokens)


def _pixio_with_mask(model, imgs, sample):
    ratio = (sample.masked_idx.shape[1] - 0.5) / sample.num_tokens  # the host rounds K down
    with noise_of(sample):
        return model(imgs, ratio)


def _audiomae_2d_own_loss(model, x, ratio):
    with mock.patch.object(model, "mask_2d", False):  # masks of rows and columns are easier or harder than random ones
        return model(x, ratio)[0]


def _audiomae_2d_with_mask(model, imgs, sample):
    with mock.patch.object(model, "mask_2d", False):  # any mask goes through its other way
        return _mae_with_mask(model, imgs, sample)


def _vit_mae_with_mask(model, imgs, sample):
    with noise_of(sample) as noise:
        return model(imgs, noise=noise)


def _hf_hiera_with_mask(model, imgs, sample):
    embed = model.hiera.embeddings.patch_embeddings
    ratio = (sample.masked_idx.shape[1] - 0.5) / sample.num_tokens  # the host rounds K down
    with noise_of(sample) as noise, mock.patch.object(embed, "mask_ratio", ratio):
        return model(imgs, noise=noise)


def _monai_with_mask(model, x, sample):
    """The prediction of the masked tokens."""
    with mock.patch.object(torch, "multinomial", return_value=sample.visible_idx):
        prediction, _ = model(x)
    return prediction.gather(1, sample.masked_idx[..., None].expand(-1, -1, prediction.shape[2]))


def _monai_loss(output, x):
    prediction, sample = output
    size = (4, 8, 8) if x.dim() == 5 else (1, 8, 8)
    video = x if x.dim() == 5 else x[:, :, None]
    return AdaMAELoss(tubelet_size=size[0], patch_size=size[1:])(prediction, video, sample).loss


def _monai_own_loss(model, x, ratio):
    prediction, mask = model(x, ratio)
    sample = MaskSample.from_mask(mask.bool(), int((1 - ratio) * mask.shape[1]))
    prediction = prediction.gather(1, sample.masked_idx[..., None].expand(-1, -1, prediction.shape[2]))
    return _monai_loss((prediction, sample), x)


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

AUDIO = (1, 256, 32) if checkout("AudioMAE") else (1, 64, 16)
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
    HostCase(
        "hf_hiera",
        make_hf_hiera,
        (3, 128, 128),
        with_mask=_hf_hiera_with_mask,
        own_loss=lambda model, x, ratio: model(x).loss,
        sizes=(
            ({"image_size": [64, 160]}, (3, 64, 160)),
            ({"num_channels": 1}, (1, 128, 128)),
            ({"num_query_pool": 3}, (3, 128, 128)),
            ({"normalize_pixel_loss": False}, (3, 128, 128)),
        ),
        **_HF,
    ),
    HostCase("mae", make_mae, (3, 32, 32), **_MAE),
    HostCase("audiomae", make_audiomae, AUDIO, **_MAE),
    HostCase(
        "audiomae 2d",
        partial(make_audiomae, mask_2d=True),
        AUDIO,
        **{**_MAE, "with_mask": _audiomae_2d_with_mask, "own_loss": _audiomae_2d_own_loss},
    ),
    HostCase(
        "pixio",
        make_pixio,
        (3, 32, 32),
        with_mask=_pixio_with_mask,
        comparable=lambda output: (output,),
        loss=lambda output, _: output,
        own_loss=lambda model, x, ratio: model(x, ratio),
    ),
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
    HostCase(
        "prithvi",
        make_prithvi,
        (6, 4, 32, 32),
        with_mask=_mae_with_mask,
        comparable=lambda output: (output[0]["loss"], *output[1:]),
        loss=lambda output, _: output[0]["loss"],
        own_loss=lambda model, x, ratio: model(x, mask_ratio=ratio)[0]["loss"],
        sizes=(
            ({"num_frames": 1}, (6, 32, 32)),
            ({"patch_size": [2, 8, 8], "in_chans": 2}, (2, 4, 32, 32)),  # a list, as in terratorch's configurations
            ({"norm_pix_loss": False, "img_size": (16, 40)}, (6, 4, 16, 40)),
            ({"coords_encoding": ["time", "location"]}, (6, 4, 32, 32)),
        ),
    ),
    HostCase(
        "monai",
        make_monai,
        (1, 16, 32, 16),
        with_mask=_monai_with_mask,
        comparable=_VIDEOMAE["comparable"],
        loss=_monai_loss,
        own_loss=_monai_own_loss,
        sizes=(
            ({"in_channels": 2, "proj_type": "perceptron"}, (2, 16, 32, 16)),
            ({"spatial_dims": 2, "img_size": 32, "patch_size": 8}, (1, 32, 32)),
        ),
    ),
)
