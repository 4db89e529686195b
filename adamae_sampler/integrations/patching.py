"""`patch` adds adaptive masking to an existing masked autoencoder, in place; `unpatch` removes it."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from adamae_sampler.integrations.audiomae import AdaptiveAudioMAE
from adamae_sampler.integrations.checks import check_host, check_same, check_sampler, check_weight, has_own_forward
from adamae_sampler.integrations.hf_hiera import AdaptiveHFHiera
from adamae_sampler.integrations.hf_videomae import AdaptiveHFVideoMAE
from adamae_sampler.integrations.hf_vit_mae import AdaptiveHFViTMAE
from adamae_sampler.integrations.hiera import AdaptiveHiera
from adamae_sampler.integrations.host import AdaptiveHost
from adamae_sampler.integrations.mae import AdaptiveMAE
from adamae_sampler.integrations.mae_st import AdaptiveMAEST
from adamae_sampler.integrations.monai import AdaptiveMONAI
from adamae_sampler.integrations.patched import patched_type
from adamae_sampler.integrations.pixio import AdaptivePixio
from adamae_sampler.integrations.prithvi import AdaptivePrithvi
from adamae_sampler.integrations.videomae import AdaptiveVideoMAE
from adamae_sampler.integrations.videomae_v2 import AdaptiveVideoMAEv2
from adamae_sampler.networks import start_even
from adamae_sampler.sampler import AdaptiveTokenSampler, TokenSampler
from adamae_sampler.sampler.maskings import PAPER_RATIO

HOSTS: dict[str, type[AdaptiveHost]] = {
    "hf_videomae": AdaptiveHFVideoMAE,
    "hf_vit_mae": AdaptiveHFViTMAE,
    "hf_hiera": AdaptiveHFHiera,
    "videomae": AdaptiveVideoMAE,
    "videomae_v2": AdaptiveVideoMAEv2,
    "mae": AdaptiveMAE,
    "mae_st": AdaptiveMAEST,
    "audiomae": AdaptiveAudioMAE,
    "pixio": AdaptivePixio,
    "hiera": AdaptiveHiera,
    "prithvi": AdaptivePrithvi,
    "monai": AdaptiveMONAI,
}

PAPER_WEIGHT = 1e-4

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    mask_ratio: float | None = None,
    *,
    network: Any = None,
    sampler: TokenSampler | None = None,
    sampling_weight: float | None = None,
    host: str | None = None,
) -> Model:
    """Gives an existing masked autoencoder adaptive masking, in place.

    The model keeps its type (as a subclass), parameters and outputs. It draws its masks with `model.sampler`, a new
    submodule. All tokens are equally likely at first, so training starts with random masks. In training it adds the
    sampling loss to its loss. `model.last_step` has the latest mask and both losses separately. Patch before you make
    the optimizer, and before DDP or `torch.compile` wraps the model. Other models of the same class do not change.
    Patching again with the same settings, or without any, changes nothing.

    Args:
        model: one of the hosts in adamae_sampler/integrations/README.md, or a subclass of one.
        mask_ratio: share of tokens to mask; if None the host's own, or 0.95 if it has none.
        network: the score network, see `AdaptiveTokenSampler`; "mha" if None. A module keeps the weights it has.
        sampler: any sampler of the package, or one of your own, instead of `mask_ratio` and `network`.
        sampling_weight: weight of the sampling loss, 1e-4 if None.
        host: a key of `adamae_sampler.integrations.HOSTS`, for a fork that renamed the host's class.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is none of the hosts, or lacks a method or submodule of the host (`HostInterfaceError`).
        ValueError: the host cannot take the ratio, the sampler is for another grid, or the model is already patched
            with other settings.
    """
    if isinstance(model, AdaptiveHost):
        check_same(model, mask_ratio, network, sampler, sampling_weight)
        return model
    mixin = find_host(model, host)
    check_host(model, mixin)
    check_weight(model, mixin, sampling_weight)
    shape = mixin.host_shape(model)
    settings = None
    if sampler is None:
        ratio = next(each for each in (mask_ratio, shape.mask_ratio, PAPER_RATIO) if each is not None)
        network = "mha" if network is None else network
        sampler = AdaptiveTokenSampler(shape.embed_dim, shape.grid_size, ratio, network)
        if isinstance(network, str):
            start_even(sampler.network)
        settings = {"mask_ratio": ratio, "network": network} if isinstance(network, str) else None
    elif mask_ratio is not None or network is not None:
        raise ValueError("a sampler has a mask_ratio and a network already: give these or a sampler, not both.")
    else:
        check_sampler(sampler, shape, type(model).__name__)
    # Nothing above changes the model. From here on, a failure undoes the changes.
    patched: Any = model
    try:
        patched.__class__ = patched_type(type(model), mixin)
        patched.__dict__.pop("forward", None)  # at most the class's forward, see has_own_forward
        patched.install(sampler, PAPER_WEIGHT if sampling_weight is None else sampling_weight, settings)
    except BaseException:
        if isinstance(model, AdaptiveHost):
            model.remove()
        raise
    return model


def unpatch(model: Model) -> Model:
    """Removes a patch. Type, attributes, methods and state-dict keys are then as before the patch.

    The sampler and its weights are removed too. If you need them, keep a reference to `model.sampler`.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is not patched.
    """
    if not isinstance(model, AdaptiveHost):
        inner = _inner(model)
        hint = f" It wraps a {type(inner).__name__}: unpatch that model." if inner is not None else ""
        hint += " See random_mae for a MAE that adaptive_mae changed." if _has_slot(model) else ""
        raise TypeError(f"{type(model).__name__} is not patched.{hint}")
    modules: list[Any] = [model, *model.patched_modules()]
    for module in modules:
        expected = patched_type(module.host_class, module.mixin)
        if type(module) is not expected or has_own_forward(module):
            raise TypeError(
                f"something else has changed the class or the forward of this {expected.__name__} since it was patched "
                f"(it is a {type(module).__name__} now; FSDP, Accelerate and parametrizations do that). Undo that "
                "first; for Accelerate, accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)."
            )
    for module in modules:
        module.__dict__.pop("forward", None)
    model.remove()
    return model


def patched_class(host_class: type[nn.Module]) -> type[Any]:
    """The patched class of a Hugging Face class, for its `from_pretrained`.

    A patched model's `save_pretrained` writes a folder. `patched_class(VideoMAEForPreTraining).from_pretrained(folder)`
    loads the model from it, with its sampler.

    Raises:
        TypeError: the class is from another library, or cannot be patched.
    """
    host_class = getattr(host_class, "host_class", host_class)  # a patched class stands for its host's
    for mixin in (AdaptiveHFVideoMAE, AdaptiveHFViTMAE, AdaptiveHFHiera):
        if set(mixin.names) & {base.__name__ for base in host_class.__mro__}:
            return cast(type[Any], patched_type(host_class, mixin))
    if hasattr(host_class, "_model_mapping"):
        raise TypeError(
            f"{host_class.__name__} chooses the host's own class, which leaves the sampler out. Name the class: "
            "patched_class(VideoMAEForPreTraining).from_pretrained(folder), or that of the model you saved."
        )
    raise TypeError(
        f"{host_class.__name__} has no from_pretrained that loads a sampler: expected a Hugging Face class, "
        "VideoMAEForPreTraining, ViTMAEForPreTraining or HieraForPreTraining. For other hosts build the model, patch "
        "it, then call load_state_dict."
    )


def find_host(model: nn.Module, host: str | None = None) -> type[AdaptiveHost]:
    """The mixin for a model.

    Raises:
        TypeError: no mixin fits the model.
        ValueError: `host` is not a key of `HOSTS`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (nn.Module) to patch, got {type(model).__name__}: {model!r:.80}.")
    if host is not None:
        if host not in HOSTS:
            raise ValueError(f"host={host!r}, expected one of {', '.join(HOSTS)}.")
        return HOSTS[host]
    names = [base.__name__ for base in type(model).__mro__]
    for name in names:  # a subclass's name says more than that of its base
        for mixin in HOSTS.values():
            if name in mixin.names and mixin.fits(model):
                return mixin
    slot = _has_slot(model)
    known = ", ".join(sorted({name for mixin in HOSTS.values() for name in mixin.names}))
    got = f"cannot patch {type(model).__module__}.{type(model).__qualname__}"
    inner = _inner(model)
    if inner is not None:
        lora = " For LoRA: get_peft_model(patch(model), LoraConfig(..., modules_to_save=['sampler']))."
        raise TypeError(
            f"{got}: it wraps a {type(inner).__name__}. Patch that first, then wrap it again."
            + (lora if hasattr(model, "peft_config") else "")
        )
    raise TypeError(
        f"{got}: expected one of {known}, or a subclass of one; found the classes {', '.join(names[:-2])}. If a fork "
        f"renamed the class, use patch(model, host=...) with one of {', '.join(HOSTS)}. For other models use "
        "AdaptiveTokenSampler directly, see the README."
        + (" For stable-pretraining's MAE there is integrations.stable_pretraining.adaptive_mae." if slot else "")
    )


def _has_slot(model: nn.Module) -> bool:
    """Whether it looks like stable-pretraining's MAE, which takes a masking."""
    return isinstance(getattr(model, "masking", None), nn.Module) and hasattr(model, "loss_fn")


def _inner(model: nn.Module) -> nn.Module | None:
    """The model inside DDP, DataParallel, torch.compile or peft; None if the model is not wrapped."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return cast(Any, model).get_base_model()
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    return inner if isinstance(inner, nn.Module) else None
