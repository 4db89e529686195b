"""The full state of model and optimiser, by parameter name, independent of the wrapper.

Wrappers are DDP, FSDP2 (shards everything) and DeepSpeed ZeRO-2 (shards the optimiser). The full state is the state
that a single process would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from common.devices import uses_deepspeed

_MOMENTS = ("exp_avg", "exp_avg_sq")  # names in AdamW's state


def full_weights(accelerator: Accelerator, model: Any) -> dict[str, Tensor]:
    """The weights on the CPU of the main process, an empty dict on the others; all processes have to call this.

    Args:
        accelerator: devices and processes.
        model: prepared.
    """
    inner = model.module if uses_deepspeed(accelerator) else model
    weights: Any = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return weights if accelerator.is_main_process else {}


def full_weights_everywhere(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that FSDP2 shards, on the device of each process; all processes have to call this."""
    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return dict(weights)


def full_state(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimiser on the CPU of the main process; all processes have to call this.

    Args:
        accelerator: devices and processes.
        model: prepared.
        optimizer: AdamW, prepared.
    """
    if uses_deepspeed(accelerator):
        return full_weights(accelerator, model), _zero_state(model.module, optimizer.optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer.optimizer, options=options)


def load_full_state(
    accelerator: Accelerator, model: Any, optimizer: Any, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """The inverse of `full_state`; every process passes the full state."""
    if uses_deepspeed(accelerator):
        model.module.load_state_dict(weights)
        _set_zero_state(model.module, optimizer.optimizer, state)
        return
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer.optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def _zero_state(model: nn.Module, zero: Any) -> dict[str, Any]:
    """The state of the AdamW within DeepSpeed's ZeRO-1 or -2 optimiser, in torch's layout.

    ZeRO lays the parameters of a group end to end and gives each process one part. A parameter's `_hp_mapping` says
    which piece of the parameter ("lp") lies where in this process's part ("hp"). It is None if no piece does.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    groups = []
    parts = zip(zero.optimizer.param_groups, zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    for group, parameters, part in parts:
        mine = zero.optimizer.state[part]  # empty before the first step
        for parameter in parameters:
            moments = {}
            for moment in _MOMENTS:
                whole = torch.zeros(parameter.numel(), device=part.device)
                if mine and parameter._hp_mapping is not None:
                    _piece(parameter, whole).copy_(_place(parameter, mine[moment]))
                torch.distributed.all_reduce(whole)  # the pieces do not overlap
                moments[moment] = whole.view_as(parameter).cpu()
            states[names[parameter]] = {"step": mine["step"].cpu().clone() if mine else torch.zeros(()), **moments}
        settings = {name: value for name, value in group.items() if name != "params"}
        groups.append({"params": [names[parameter] for parameter in parameters], **settings})
    return {"state": states, "param_groups": groups}


def _set_zero_state(model: nn.Module, zero: Any, state: Mapping[str, Any]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameters, part in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        mine = {moment: torch.zeros_like(part) for moment in _MOMENTS}
        for parameter in parameters:
            saved = state["state"][names[parameter]]
            if parameter._hp_mapping is not None:
                _place(parameter, part.data).copy_(_piece(parameter, parameter.detach().flatten()))
                for moment in _MOMENTS:
                    _place(parameter, mine[moment]).copy_(_piece(parameter, saved[moment].flatten()))
            steps = saved["step"].to(part.device)
        zero.optimizer.state[part] = {"step": steps, **mine}


def _piece(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """The piece of a flat parameter that this process holds."""
    address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
    return whole.narrow(0, address.start, address.numel)


def _place(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The place of the parameter's piece in this process's part of the group."""
    address = parameter._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]
    return part.narrow(0, address.start, address.numel)
