"""Training steps of the hosts that `patch` knows, unpatched and patched, at their own masking ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamae_sampler import AdaMAELoss, RandomTokenSampler, patch
from adamae_sampler.integrations.patching import find_host
from benchmarks.core.rows import Subject
from benchmarks.ops.official import official_error
from benchmarks.steps.repositories import import_from
from benchmarks.steps.step import AnyStep, Step

UNPATCHED, PATCHED = "unpatched", "patched"


@dataclass(frozen=True)
class HostStep(AnyStep):
    """A training step of a host.

    Attributes:
        host: its name, a key of HOSTS below.
        implementation: "unpatched" or "patched".
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
        if self.implementation == PATCHED:
            patch(model, host.ratio)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4)

        def step() -> Tensor:
            loss = host.patched_loss(model, x) if self.implementation == PATCHED else host.own_loss(model, x, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def _model(self) -> nn.Module:
        return HOSTS[self.host].make(self.folder, self.quick)

    def _fixed_sampler(self, model: nn.Module) -> RandomTokenSampler:
        return RandomTokenSampler(find_host(model).host_shape(model).grid_size, HOSTS[self.host].ratio)


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
        clips: of a batch on a CPU.
    """

    make: Callable[[Path | None, bool], nn.Module]
    shape: tuple[int, ...]
    quick_shape: tuple[int, ...]
    ratio: float
    own_loss: Callable[[Any, Tensor, Tensor], Tensor]
    patched_loss: Callable[[Any, Tensor], Tensor]
    repository: str | None = None
    clips: int = 2


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
        small |= {"input_size": (16, 64, 64)} if quick else {}
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
HOSTS = {
    "Hugging Face VideoMAE-B": Host(
        _hf_videomae, (16, 3, 224, 224), (16, 3, 32, 32), 0.9,
        own_loss=lambda model, x, mask: _first(model(x, bool_masked_pos=mask)), **_TUPLE,
    ),
    "Hugging Face ViTMAE-B": Host(
        _hf_vit_mae, _IMAGE, (3, 32, 32), 0.75, own_loss=lambda model, x, _: _first(model(x)), clips=8, **_TUPLE
    ),
    "Hiera-B, images": Host(
        _hiera, _IMAGE, (3, 64, 64), 0.6, own_loss=lambda model, x, _: _first(model(x, 0.6)), clips=8, **_TUPLE
    ),
    "Hiera-B, video": Host(
        partial(_hiera, video=True), _VIDEO, (3, 16, 64, 64), 0.9,
        own_loss=lambda model, x, _: _first(model(x, 0.9)), clips=1, **_TUPLE,
    ),
    "mae, ViT-B": Host(
        _mae, _IMAGE, (3, 32, 32), 0.75,
        own_loss=lambda model, x, _: _first(model(x, 0.75)), repository="mae", clips=8, **_TUPLE,
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
}  # fmt: skip


def host_groups(folder: Path | None, quick: bool) -> list[tuple[HostStep, HostStep]]:
    """Each host unpatched and patched: the installed ones, and those that are checked out in `folder`."""
    return [
        (HostStep(name, UNPATCHED, clips, folder, quick), HostStep(name, PATCHED, clips, folder, quick))
        for name, host in HOSTS.items()
        if host.repository is None or (folder is not None and (folder / host.repository).is_dir())
        for clips in [1 if quick else host.clips]
    ]
