"""Training steps of the hosts that `patch` knows, unpatched and patched, at their own masking ratio."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adamae_sampler import AdaMAELoss, MaskSample, RandomTokenSampler, patch
from adamae_sampler.integrations.patching import find_host
from adamae_sampler.integrations.stable_pretraining import adaptive_mae
from adamae_sampler.ops import patchify
from adamae_sampler.positions import GridSize
from benchmarks.core.rows import Subject
from benchmarks.ops.official import official_error
from benchmarks.steps.repositories import import_from
from benchmarks.steps.step import AnyStep, Step

UNPATCHED, PATCHED, POOLED = "unpatched", "patched", "pooled"


@dataclass(frozen=True)
class HostStep(AnyStep):
    """A training step of a host.

    Attributes:
        host: its name, a key of HOSTS below.
        implementation: "unpatched"; "patched", with the paper's scores; or "pooled", patched with pooled scores.
        clips: of a batch.
        folder: of the checkouts that hold the research code.
        quick: tiny sizes.
    """

    host: str
    implementation: str
    clips: int
    folder: Path | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        """The name that people read, the same patched and unpatched."""
        return f"{self.host}, {HOSTS[self.host].ratio:.0%}, {self.clips} x {'x'.join(map(str, self.shape))}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return HOSTS[self.host].quick_shape if self.quick else HOSTS[self.host].shape

    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""
        sampler = self._fixed_sampler(self._model())
        return Subject(
            suite,
            case=self.name,
            op=self.host,
            direction="step",
            clips=self.clips,
            tokens=sampler.num_tokens,
            visible=sampler.num_visible,
            dtype="float32",
            shape="x".join(map(str, self.shape)),
        )

    def make(self, device: torch.device) -> Step:
        """See `AnyStep`."""
        host = HOSTS[self.host]
        model = self._model().to(device).train()
        x = torch.randn(self.clips, *self.shape, device=device)
        sampler = self._fixed_sampler(model)
        mask = sampler(x.new_zeros(self.clips, sampler.num_tokens, 1)).mask  # the loader draws it
        if self.implementation != UNPATCHED:
            host.patch(model, host.ratio, network="pooled" if self.implementation == POOLED else "mha")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4)

        def step() -> Tensor:
            loss = host.own_loss(model, x, mask) if self.implementation == UNPATCHED else host.patched_loss(model, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def _model(self) -> nn.Module:
        return HOSTS[self.host].make(self.folder, self.quick)

    def _fixed_sampler(self, model: nn.Module) -> RandomTokenSampler:
        return RandomTokenSampler(HOSTS[self.host].grid_of(model), HOSTS[self.host].ratio)


def _grid_of(model: nn.Module) -> GridSize:
    return find_host(model).host_shape(model).grid_size


@dataclass(frozen=True)
class Host:
    """How a host is made and trained.

    Attributes:
        make: (folder of checkouts, quick) -> its ViT-B.
        shape: of an input; of a tiny one.
        ratio: share of tokens masked.
        own_loss: (unpatched model, input, mask) -> loss.
        patched_loss: (patched model, input) -> loss.
        repository: folder of its checkout, if it is not installed.
        package: that holds it, if it is no dependency of the tests.
        clips: of a batch on a CPU.
        patch: as `adamae_sampler.patch`.
        grid_of: an unpatched model -> the grid of its tokens.
    """

    make: Callable[[Path | None, bool], nn.Module]
    shape: tuple[int, ...]
    quick_shape: tuple[int, ...]
    ratio: float
    own_loss: Callable[[Any, Tensor, Tensor], Tensor]
    patched_loss: Callable[[Any, Tensor], Tensor]
    repository: str | None = None
    package: str | None = None
    clips: int = 1
    patch: Callable[..., nn.Module] = patch
    grid_of: Callable[[nn.Module], GridSize] = _grid_of


def _hf_videomae(folder: Path | None, quick: bool) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config: dict[str, Any] = {"image_size": 32, "num_hidden_layers": 1, "decoder_num_hidden_layers": 1} if quick else {}
    return VideoMAEForPreTraining(VideoMAEConfig(**config))


def _hf_vit_mae(folder: Path | None, quick: bool) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config: dict[str, Any] = {"image_size": 32, "num_hidden_layers": 1, "decoder_num_hidden_layers": 1} if quick else {}
    return ViTMAEForPreTraining(ViTMAEConfig(**config))


def _hiera(folder: Path | None, quick: bool, video: bool = False) -> nn.Module:
    from hiera import hiera_mae

    small: dict[str, Any] = {"stages": (1, 1, 1, 1), "decoder_depth": 1} if quick else {}
    if video:
        model: nn.Module = hiera_mae.mae_hiera_base_16x224(pretrained=False, **small)
    else:
        small |= {"input_size": (64, 64)} if quick else {}
        model = hiera_mae.MaskedAutoencoderHiera(
            **{"embed_dim": 96, "num_heads": 1, "stages": (2, 3, 16, 3), "q_pool": 2, **small}
        )
    return model


def _mae(folder: Path | None, quick: bool) -> nn.Module:
    size = {"img_size": 32, "depth": 1, "decoder_depth": 1} if quick else {"img_size": 224, "depth": 12}
    module = import_from(_checkout(folder, "mae"), "models_mae")
    model: nn.Module = module.MaskedAutoencoderViT(embed_dim=768, num_heads=12, norm_pix_loss=True, **size)
    return model


def _mae_st(folder: Path | None, quick: bool) -> nn.Module:
    size = {"img_size": 32, "depth": 1, "decoder_depth": 1} if quick else {"depth": 12, "decoder_depth": 4}
    module = import_from(_checkout(folder, "mae_st").parent, "mae_st.models_mae")
    options = {"t_patch_size": 2, "sep_pos_embed": True, "cls_embed": True, "norm_pix_loss": True}
    model: nn.Module = module.MaskedAutoencoderViT(embed_dim=768, num_heads=12, **options, **size)
    return model


def _videomae(folder: Path | None, quick: bool, repository: str = "VideoMAE") -> nn.Module:
    name = {"VideoMAE": "modeling_pretrain", "VideoMAEv2": "models.modeling_pretrain"}[repository]
    size = {"img_size": 32, "encoder_depth": 1} if quick else {"img_size": 224}
    model: nn.Module = import_from(_checkout(folder, repository), name).PretrainVisionTransformer(
        decoder_embed_dim=384, decoder_depth=4, decoder_num_heads=6, qkv_bias=True, norm_layer=nn.LayerNorm, **size
    )
    return model


def _hf_hiera(folder: Path | None, quick: bool) -> nn.Module:
    from transformers import HieraConfig, HieraForPreTraining

    config: dict[str, Any] = {"num_query_pool": 2, "decoder_hidden_size": 512, "decoder_depth": 8}  # as facebook's
    config |= {"image_size": [64, 64], "depths": [1, 1, 1, 1], "decoder_depth": 1} if quick else {}
    return HieraForPreTraining(HieraConfig(decoder_num_heads=16, **config))


def _prithvi(folder: Path | None, quick: bool) -> nn.Module:
    from terratorch.models.backbones.prithvi_mae import PrithviMAE  # type: ignore[import-untyped]

    model: nn.Module = PrithviMAE(
        norm_pix_loss=True, **({"img_size": 32, "depth": 1, "decoder_depth": 1} if quick else {})
    )
    return model


def _monai(folder: Path | None, quick: bool) -> nn.Module:
    from monai.networks.nets import MaskedAutoEncoderViT  # type: ignore[attr-defined]

    size: dict[str, Any] = {"img_size": (32,) * 3, "num_layers": 1} if quick else {"img_size": (96,) * 3}
    model: nn.Module = MaskedAutoEncoderViT(in_channels=1, patch_size=(16,) * 3, mlp_dim=3072, **size)
    return model


def _monai_own(model: Any, x: Tensor, _: Tensor) -> Tensor:
    prediction, mask = model(x)
    target = patchify(x, patch_size=16, tubelet_size=16)
    loss: Tensor = ((prediction - target).square().mean(2) * mask).sum() / mask.sum()
    return loss


def _monai_patched(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = AdaMAELoss(tubelet_size=16, normalize=False)(*_with_input(model(x), x)).loss
    return loss


def _with_input(output: tuple[Tensor, MaskSample], x: Tensor) -> tuple[Tensor, Tensor, MaskSample]:
    return output[0], x, output[1]


def _audiomae(folder: Path | None, quick: bool) -> nn.Module:
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # its forward moves a zero
    size: dict[str, Any] = {"img_size": (64, 32), "depth": 1} if quick else {"img_size": (1024, 128), "depth": 12}
    model: nn.Module = import_from(_checkout(folder, "AudioMAE"), "models_mae").MaskedAutoencoderViT(
        embed_dim=768, num_heads=12, in_chans=1, audio_exp=True, norm_pix_loss=True, **size
    )
    return model


def _pixio(folder: Path | None, quick: bool) -> nn.Module:
    size = {"img_size": 128, "depth": 1, "decoder_depth": 1} if quick else {"img_size": 256, "depth": 12}
    module = import_from(_checkout(folder, "pixio") / "pretraining", "models_pixio")
    model: nn.Module = module.PixioViT(embed_dim=768, num_heads=12, **size)
    return model


def _stable_pretraining(folder: Path | None, quick: bool) -> nn.Module:
    from stable_pretraining.methods import MAE

    size: dict[str, Any] = {"img_size": 32, "depth": 1} if quick else {}
    decoder: dict[str, Any] = {"decoder_depth": 1} if quick else {}
    model: nn.Module = MAE(VisionTransformer(num_classes=0, **size), **decoder)
    return model


def _stable_grid(model: Any) -> GridSize:
    return 1, model.encoder.default_grid_h, model.encoder.default_grid_w


def _checkout(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise FileNotFoundError(f"{name} is timed in a checkout; name the folder that holds it with --checkouts.")
    return folder / name


def _videomae_own(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    return official_error(model(x, mask), x, mask).mean()


def _videomae_patched(model: Any, x: Tensor) -> Tensor:
    prediction, sample = model(x)
    loss: Tensor = _criterion(prediction, x, sample).loss
    return loss


_criterion = AdaMAELoss()
_IMAGE, _VIDEO = (3, 224, 224), (3, 16, 224, 224)


def _first(output: Any) -> Tensor:
    loss: Tensor = output[0]
    return loss


_TUPLE: dict[str, Any] = {"patched_loss": lambda model, x: _first(model(x))}
_SCALAR: dict[str, Any] = {"patched_loss": lambda model, x: model(x)}
HOSTS = {
    "Hugging Face VideoMAE-B": Host(
        _hf_videomae, (16, 3, 224, 224), (16, 3, 32, 32), 0.9,
        own_loss=lambda model, x, mask: _first(model(x, bool_masked_pos=mask)), **_TUPLE,
    ),
    "Hugging Face ViTMAE-B": Host(
        _hf_vit_mae, _IMAGE, (3, 32, 32), 0.75, own_loss=lambda model, x, _: _first(model(x)), clips=4, **_TUPLE
    ),
    "Hiera-B, images": Host(
        _hiera, _IMAGE, (3, 64, 64), 0.6, own_loss=lambda model, x, _: _first(model(x, 0.6)), clips=4, **_TUPLE
    ),
    "Hiera-B, video": Host(
        partial(_hiera, video=True), _VIDEO, _VIDEO, 0.9,
        own_loss=lambda model, x, _: _first(model(x, 0.9)), **_TUPLE,
    ),
    "mae, ViT-B": Host(
        _mae, _IMAGE, (3, 32, 32), 0.75,
        own_loss=lambda model, x, _: _first(model(x, 0.75)), repository="mae", clips=4, **_TUPLE,
    ),
    "mae_st, ViT-B": Host(
        _mae_st, _VIDEO, (3, 16, 32, 32), 0.9,
        own_loss=lambda model, x, _: _first(model(x, 0.9)), repository="mae_st", **_TUPLE,
    ),
    "VideoMAE, ViT-B": Host(
        _videomae, _VIDEO, (3, 16, 32, 32), 0.9, _videomae_own, _videomae_patched, repository="VideoMAE"
    ),
    "VideoMAEv2, ViT-B": Host(
        partial(_videomae, repository="VideoMAEv2"), _VIDEO, (3, 16, 32, 32), 0.9,
        _videomae_own, _videomae_patched, repository="VideoMAEv2",
    ),
    "Hugging Face Hiera-B": Host(
        _hf_hiera, _IMAGE, (3, 64, 64), 0.6, own_loss=lambda model, x, _: _first(model(x)), clips=4, **_TUPLE
    ),
    "MONAI, ViT-B, volumes": Host(
        _monai, (1, 96, 96, 96), (1, 32, 32, 32), 0.75, _monai_own, _monai_patched, clips=4
    ),
    "AudioMAE, ViT-B": Host(
        _audiomae, (1, 1024, 128), (1, 64, 32), 0.8,
        own_loss=lambda model, x, _: _first(model(x, 0.8)), repository="AudioMAE", clips=2, **_TUPLE,
    ),
    "Pixio, ViT-B": Host(
        _pixio, (3, 256, 256), (3, 128, 128), 0.75,
        own_loss=lambda model, x, _: model(x, 0.75), repository="pixio", clips=2, **_SCALAR,
    ),
    "PrithviMAE, ViT-B, series": Host(
        _prithvi, (6, 4, 224, 224), (6, 4, 32, 32), 0.75,
        own_loss=lambda model, x, _: model(x)[0]["loss"], patched_loss=lambda model, x: model(x)[0]["loss"],
        package="terratorch",
    ),
    "stable-pretraining, ViT-B": Host(
        _stable_pretraining, _IMAGE, (3, 32, 32), 0.75,
        own_loss=lambda model, x, _: model(x).loss, patched_loss=lambda model, x: model(x).loss,
        package="stable_pretraining", clips=4, patch=adaptive_mae, grid_of=_stable_grid,
    ),
}  # fmt: skip


def host_groups(folder: Path | None, quick: bool) -> list[list[HostStep]]:
    """Each host unpatched and patched: the installed ones, and those that are checked out in `folder`."""
    return [
        [HostStep(name, each, 1 if quick else host.clips, folder, quick) for each in (UNPATCHED, PATCHED, POOLED)]
        for name, host in HOSTS.items()
        if host.repository is None or (folder is not None and (folder / host.repository).is_dir())
        if host.package is None or importlib.util.find_spec(host.package) is not None
    ]
