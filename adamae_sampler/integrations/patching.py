"""`patch` and `unpatch`: an existing masked autoencoder gets adaptive masking in place, and gives it back."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar, cast

from torch import nn

from adamae_sampler.integrations.hf_videomae import AdaptiveHFVideoMAE
from adamae_sampler.integrations.hf_vit_mae import AdaptiveHFViTMAE
from adamae_sampler.integrations.hiera import AdaptiveHiera
from adamae_sampler.integrations.host import AdaptiveHost, SeamError, patched_type
from adamae_sampler.integrations.mae import AdaptiveMAE
from adamae_sampler.integrations.mae_st import AdaptiveMAEST
from adamae_sampler.integrations.videomae import AdaptiveVideoMAE
from adamae_sampler.integrations.videomae_v2 import AdaptiveVideoMAEv2
from adamae_sampler.networks import MHAScoreNetwork, MLPScoreNetwork
from adamae_sampler.sampler import AdaptiveTokenSampler, TokenSampler

HOSTS: dict[str, type[AdaptiveHost]] = {
    "hf_videomae": AdaptiveHFVideoMAE,
    "hf_vit_mae": AdaptiveHFViTMAE,
    "videomae": AdaptiveVideoMAE,
    "videomae_v2": AdaptiveVideoMAEv2,
    "mae": AdaptiveMAE,
    "mae_st": AdaptiveMAEST,
    "hiera": AdaptiveHiera,
}

PAPER_RATIO = 0.95  # where the host has no ratio of its own

Model = TypeVar("Model", bound=nn.Module)


def patch(
    model: Model,
    mask_ratio: float | None = None,
    *,
    network: Any = "mha",
    sampler: TokenSampler | None = None,
    sampling_weight: float = 1e-4,
    host: str | None = None,
) -> Model:
    """Gives an existing masked autoencoder adaptive masking, in place.

    The model keeps its type (as a subclass), parameters and outputs; it draws its masks with `model.sampler`, a new
    submodule, and adds the sampling loss to its loss in training. `model.last_step` has the latest mask and the two
    losses apart. Patch before the optimizer is made, and before DDP or `torch.compile` wraps the model. Other models
    of the same class are untouched. Patching again with the same settings changes nothing.

    Args:
        model: one of the hosts in the README, or a subclass of one.
        mask_ratio: share of tokens to mask; if None the host's own, or 0.95 if it has none.
        network: the score network, see `AdaptiveTokenSampler`.
        sampler: a sampler of your own (random, tube, frame, or adaptive with other settings), which then has the
            ratio and the network.
        sampling_weight: weight of the sampling loss.
        host: which host to take the model for, a key of `adamae_sampler.integrations.HOSTS`, for a fork that renamed
            its class.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is none of the hosts, or lacks what the patch holds on to (`SeamError`).
        ValueError: a ratio that the host cannot take, a sampler for another grid, or a model that is patched with
            other settings.
    """
    if isinstance(model, AdaptiveHost):
        _check_same(model, mask_ratio, network, sampler, sampling_weight)
        return model
    mixin = find_host(model, host)
    check_seams(model, mixin)
    shape = mixin.describe(model)
    settings = None
    if sampler is None:
        ratio = next(each for each in (mask_ratio, shape.mask_ratio, PAPER_RATIO) if each is not None)
        sampler = AdaptiveTokenSampler(shape.embed_dim, shape.grid_size, ratio, network)
        settings = {"mask_ratio": ratio, "network": network} if isinstance(network, str) else None
    elif mask_ratio is not None or network != "mha":
        raise ValueError("mask_ratio and network are the sampler's own: give them or a sampler, not both.")
    elif sampler.grid_size != tuple(shape.grid_size):
        raise ValueError(
            f"the sampler's grid_size is {sampler.grid_size}, but the tokens of this {type(model).__name__} are "
            f"{tuple(shape.grid_size)} (time, height, width). Build the sampler with that grid."
        )
    # Nothing above has changed the model; from here on a failure takes back what was done.
    patched: Any = model
    try:
        patched.__class__ = patched_type(type(model), mixin)
        patched.install(sampler, sampling_weight, settings)
    except BaseException:
        if isinstance(model, AdaptiveHost):
            model.remove()
        raise
    return model


def unpatch(model: Model) -> Model:
    """Takes a patch back: type, attributes, methods and state-dict keys are as they were before.

    The sampler goes with its weights; keep `model.sampler` first if you want them.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is not patched.
    """
    if not isinstance(model, AdaptiveHost):
        raise TypeError(f"{type(model).__name__} is not patched{_hint_of_wrapper(model)}.")
    modules: list[Any] = [model, *(model.get_submodule(name) for name in model.parts)]
    for module in modules:
        expected = patched_type(module.host_class, module.mixin)
        if type(module) is not expected:
            raise TypeError(
                f"something else has changed the class of this {expected.__name__} since it was patched, to "
                f"{type(module).__name__} (FSDP, a parametrization). Undo that first, or unpatch before it."
            )
    model.remove()
    return model


def patched_class(host_class: type[nn.Module]) -> type[Any]:
    """The class that `patch` makes of a Hugging Face class, for its `from_pretrained`.

    Use: `patched_class(VideoMAEForPreTraining).from_pretrained(folder)` loads what a patched model's `save_pretrained`
    wrote, the sampler with it.

    Raises:
        TypeError: a class of another library, or none that can be patched.
    """
    for mixin in (AdaptiveHFVideoMAE, AdaptiveHFViTMAE):
        if set(mixin.names) & {base.__name__ for base in host_class.__mro__}:
            return cast(type[Any], patched_type(host_class, mixin))
    raise TypeError(
        f"{host_class.__name__} has no from_pretrained that would keep a sampler: expected a Hugging Face class, "
        "VideoMAEForPreTraining or ViTMAEForPreTraining. For other hosts make the model, patch it, then load its state."
    )


def find_host(model: nn.Module, host: str | None = None) -> type[AdaptiveHost]:
    """The mixin for a model.

    Raises:
        TypeError: there is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model (nn.Module) to patch, got {type(model).__name__}: {model!r:.80}.")
    if host is not None:
        if host not in HOSTS:
            raise ValueError(f"host={host!r}, expected one of {', '.join(HOSTS)}.")
        return HOSTS[host]
    names = [base.__name__ for base in type(model).__mro__]
    named = [mixin for mixin in HOSTS.values() if set(names) & set(mixin.names)]
    for mixin in named:
        if mixin.fits(model):
            return mixin
    known = sorted({name for mixin in HOSTS.values() for name in mixin.names})
    raise TypeError(
        f"cannot patch {type(model).__module__}.{type(model).__qualname__}: expected one of {', '.join(known)} or a "
        f"subclass of one{_hint_of_wrapper(model)}. Found the classes {', '.join(names[:-2])}. For a fork that renamed "
        f"its class name the host, patch(model, host=...), one of {', '.join(HOSTS)}; for other code use "
        "AdaptiveTokenSampler directly, see the README."
    )


def check_seams(model: nn.Module, mixin: type[AdaptiveHost]) -> None:
    """Raises SeamError unless the model has what the mixin holds on to."""
    problems = []
    for name, expected in mixin.seams.items():
        found: Any = model
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(expected, type):
            if not isinstance(found, expected):
                problems.append(f"{name}: looked for a {expected.__name__}, found {_describe(found)}")
            continue
        wanted = f"{name}({', '.join(expected)})"
        if not callable(found):
            problems.append(f"looked for the method {wanted}, found {_describe(found)}")
        elif (parameters := tuple(inspect.signature(found).parameters))[: len(expected)] != expected:
            problems.append(f"looked for {wanted}, found {name}({', '.join(parameters)})")
    if problems:
        raise SeamError(
            f"{type(model).__module__}.{type(model).__qualname__} is not the {mixin.names[0]} that the patch knows:\n  "
            + "\n  ".join(problems)
            + "\nIt is another version of it, or another model of that name. The model was left as it was."
        )
    added = {"sampler", "sampling_weight", *dir(mixin)} - set(dir(nn.Module)) - set(mixin.seams)
    if taken := sorted(name for name in added if hasattr(model, name) and not name.startswith("__")):
        raise SeamError(
            f"{type(model).__module__}.{type(model).__qualname__} has attributes of its own that the patch would hide: "
            f"{', '.join(taken)}. Rename them, or use AdaptiveTokenSampler directly, see the README."
        )
    mixin.probe(model)


def _check_same(
    model: AdaptiveHost, mask_ratio: float | None, network: Any, sampler: TokenSampler | None, sampling_weight: float
) -> None:
    """Raises ValueError if a patched model is to be patched with other settings, which would lose its sampler."""
    other = []
    if mask_ratio is not None and mask_ratio != model.sampler.mask_ratio:
        other.append(f"mask_ratio={mask_ratio}, where it has {model.sampler.mask_ratio}")
    if sampler is not None and sampler is not model.sampler:
        other.append(f"sampler={sampler}, where it has {model.sampler}")
    own = getattr(model.sampler, "network", None)
    kinds = {"mha": MHAScoreNetwork, "mlp": MLPScoreNetwork}
    if sampler is None and not (own is network or (network in kinds and isinstance(own, kinds[network]))):
        other.append(f"network={network!r}, where it has {type(own).__name__}")
    if sampling_weight != model.sampling_weight:
        other.append(f"sampling_weight={sampling_weight}, where it has {model.sampling_weight}")
    if other:
        raise ValueError(
            f"this {type(model).__name__} is patched already, and now asked for {'; '.join(other)}. To change that, "
            "unpatch(model) first, which drops its sampler, weights and all."
        )


def _describe(found: Any) -> str:
    return "nothing of that name" if found is None else f"a {type(found).__name__}"


def _hint_of_wrapper(model: nn.Module) -> str:
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if not isinstance(inner, nn.Module):
        return ""
    return f" (it wraps a {type(inner).__name__}: patch that, before it is wrapped)"
