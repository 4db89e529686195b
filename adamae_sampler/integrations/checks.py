"""Checks of a model before it is patched, and of the arguments of `patch`. No check changes the model."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import nn

from adamae_sampler.integrations.host import AdaptiveHost, HostShape
from adamae_sampler.integrations.patched import HostInterfaceError, Patched
from adamae_sampler.networks import network_name
from adamae_sampler.sampler import TokenSampler


def check_host(model: nn.Module, mixin: type[AdaptiveHost]) -> None:
    """Raises HostInterfaceError unless the model can be patched with the mixin."""
    _check_interface(model, mixin)
    _check_names(model, mixin)
    _check_wrappers(model, mixin)
    mixin.probe(model)


def check_sampler(sampler: TokenSampler, shape: HostShape, name: str) -> None:
    """Raises TypeError or ValueError unless the sampler fits the host's tokens."""
    if not isinstance(sampler, TokenSampler):
        raise TypeError(f"sampler is {sampler!r:.80}, expected a TokenSampler, such as TubeTokenSampler(grid, 0.9).")
    if sampler.grid_size != tuple(shape.grid_size):
        raise ValueError(
            f"the sampler's grid_size is {sampler.grid_size}, but the tokens of this {name} are "
            f"{tuple(shape.grid_size)} (time, height, width). Build the sampler with that grid."
        )
    if sampler.num_masks > 1:
        raise ValueError(
            f"the sampler draws {sampler.num_masks} masks of each clip, and {name} takes one. Use num_masks=1, or "
            "repeat the clips in the batch."
        )
    if getattr(sampler, "target_ratio", 0):
        raise ValueError(
            f"the sampler has target_ratio={sampler.target_ratio}, and {name} decodes all masked tokens. Leave it out, "
            "or use the sampler in a model of your own."
        )
    if getattr(sampler, "embed_dim", shape.embed_dim) != shape.embed_dim:
        raise ValueError(
            f"the sampler's embed_dim is {sampler.embed_dim}, but the tokens of this {name} are {shape.embed_dim} "
            "wide. Build the sampler with that width."
        )


def check_weight(model: nn.Module, mixin: type[AdaptiveHost], weight: float | None) -> None:
    """Raises ValueError if the weight is not a number of at least 0, or if the host computes no loss."""
    if weight is None:
        return
    if not mixin.computes_loss:
        raise ValueError(
            f"sampling_weight={weight!r} has no use here: the training engine computes the loss of "
            f"{type(model).__name__}. Give the weight to the loss there, AdaMAELoss(sampling_weight=...)."
        )
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"sampling_weight={weight!r}, expected a number of at least 0, such as 1e-4.")


def check_same(
    model: AdaptiveHost, mask_ratio: float | None, network: Any, sampler: TokenSampler | None, weight: float | None
) -> None:
    """Raises ValueError if a patched model is patched again with other settings: its sampler would be lost."""
    own = getattr(model.sampler, "network", None)
    name = None if own is None else network_name(own)
    same_network = own is network or (isinstance(network, str) and name == network)
    asked = {
        "mask_ratio": (mask_ratio, model.sampler.mask_ratio, mask_ratio == model.sampler.mask_ratio),
        "network": (network, name or type(own).__name__, same_network),
        "sampler": (sampler, model.sampler, sampler is model.sampler),
        "sampling_weight": (weight, model.sampling_weight, weight == model.sampling_weight),
    }
    other = [
        f"{name}={new!r} instead of {old!r}" for name, (new, old, same) in asked.items() if new is not None and not same
    ]
    if other:
        raise ValueError(
            f"this {type(model).__name__} is patched already, and the call asks for {'; '.join(other)}. To change the "
            "settings, unpatch(model) first; that drops its sampler with all weights."
        )


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward other than that of its class.

    Accelerate's unwrapping leaves the class's forward on the instance, which does not count.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _check_interface(model: nn.Module, mixin: type[AdaptiveHost]) -> None:
    """Raises HostInterfaceError if the model lacks a part of the interface that the mixin expects."""
    problems = []
    submodules = dict(model.named_modules())
    for name in (mixin.tokenizer, *mixin.patched_submodules):
        if name not in submodules:
            problems.append(f"looked for the submodule {name}, found nothing of that name")
    for name, expected in mixin.expected_interface.items():
        found: Any = model
        for attribute in name.split("."):
            found = getattr(found, attribute, None)
        if isinstance(expected, type):
            if not isinstance(found, expected):
                problems.append(f"{name}: looked for a {expected.__name__}, found {_kind_of(found)}")
            continue
        wanted = f"{name}({', '.join(expected)})"
        if not callable(found):
            problems.append(f"looked for the method {wanted}, found {_kind_of(found)}")
        elif (parameters := tuple(inspect.signature(found).parameters))[: len(expected)] != expected:
            problems.append(f"looked for {wanted}, found {name}({', '.join(parameters)})")
    if problems:
        raise HostInterfaceError(
            f"{type(model).__module__}.{type(model).__qualname__} is not the {mixin.names[0]} that the patch knows:\n  "
            + "\n  ".join(problems)
            + "\nThe class is of another version, or another model has the same name. The model was left as it was."
        )


def _check_names(model: nn.Module, mixin: type[AdaptiveHost]) -> None:
    """Raises HostInterfaceError if the patch would hide attributes of the model."""
    overridden = {*dir(nn.Module), *mixin.expected_interface, *mixin.overrides}
    added = {"sampler", "sampling_weight", *dir(mixin)} - overridden
    if taken := sorted(name for name in added if hasattr(model, name) and not name.startswith("__")):
        raise HostInterfaceError(
            f"{type(model).__module__}.{type(model).__qualname__} has attributes that the patch would hide: "
            f"{', '.join(taken)}. Rename them, or use AdaptiveTokenSampler directly, see the README."
        )


def _check_wrappers(model: nn.Module, mixin: type[AdaptiveHost]) -> None:
    """Raises HostInterfaceError if a wrapper or hook would break when the classes are exchanged."""
    modules = [("the model", model), *((name, model.get_submodule(name)) for name in mixin.patched_submodules)]
    for name, module in modules:
        if isinstance(module, Patched):
            raise HostInterfaceError(
                f"{name} belongs to another patched model. Patch only one of the models that share it."
            )
        if has_own_forward(module) or hasattr(module, "parametrizations") or hasattr(module, "_hf_hook"):
            raise HostInterfaceError(
                f"{name} has a forward of its own, a parametrization or a hook of Accelerate, and a patch would break "
                "it. Patch first, then wrap; or unwrap with accelerate.utils.extract_model_from_parallel(model, "
                "keep_fp32_wrapper=False)."
            )
    if any(each.is_meta for each in model.get_submodule(mixin.tokenizer).parameters()):
        raise HostInterfaceError(
            "the model is on the meta device, expected real weights. Load them (model.to_empty, then load), then patch "
            "the model."
        )


def _kind_of(found: Any) -> str:
    return "nothing of that name" if found is None else f"a {type(found).__name__}"
