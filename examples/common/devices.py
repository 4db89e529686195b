"""Devices and processes, precision and compilation, and pixels on the device."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, TorchDynamoPlugin
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from adamae_sampler.transformer import Block

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(precision: str, compiled: bool = False, tracker: str | None = None) -> Accelerator:
    """Accelerate's handle on devices and processes, for DDP, FSDP2 or DeepSpeed, as the launcher says.

    Args:
        precision: 'auto', 'fp32', 'bf16' or 'fp16'.
        compiled: whether `prepare` compiles the model as a whole.
        tracker: where metrics are sent besides files, 'wandb' or 'trackio'.

    Raises:
        ValueError: a precision that the device lacks, a tracker that is not installed, or shards without GPUs.
    """
    # Said outright, since torchrun without a GPU would otherwise start processes that do not know of each other.
    on_cpu = not torch.accelerator.is_available()
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--tracker {tracker} is not installed; pip install {tracker}.")
    if precision == "fp16" and on_cpu:
        raise ValueError("--precision fp16 needs a GPU; CPUs have fp32 and bf16.")
    if precision == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if good else "fp32"
    with_deepspeed, with_fsdp = (
        os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true" for name in ("DEEPSPEED", "FSDP")
    )
    if precision == "fp16" and with_deepspeed:
        # Its scale under autocast never falls (0.19), so that all steps after the first overflow would be skipped.
        raise ValueError("--precision fp16 does not work with DeepSpeed; use bf16, or DDP or FSDP2.")
    accelerator = Accelerator(
        cpu=on_cpu and not with_deepspeed,
        mixed_precision="no" if with_deepspeed or precision == "fp32" else precision,
        log_with=tracker,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if compiled else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
    )
    sharded, alone = accelerator.distributed_type in ("DEEPSPEED", "FSDP"), accelerator.num_processes == 1
    if (with_deepspeed or with_fsdp) and (not sharded or alone):
        gpus = torch.accelerator.device_count()
        raise ValueError(
            "the launch file is for FSDP2 or DeepSpeed, which Accelerate runs on two or more GPUs, and "
            f"{gpus} were found. Use examples/launch/one_machine.yaml, or none."
        )
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is configured; set fsdp_version: 2, as examples/launch/fsdp2.yaml does.")
    if with_fsdp and precision != "fp32":  # blocks are gathered in half precision; gradients are summed in fp32
        policy = MixedPrecisionPolicy(_DTYPES[precision], torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if with_deepspeed:  # autocast over fp32 weights, as elsewhere, in place of DeepSpeed's weights in half precision
        dtype = str(_DTYPES.get(precision, torch.bfloat16)).removeprefix("torch.")
        deepspeed_config(accelerator)["torch_autocast"] = {"enabled": precision != "fp32", "dtype": dtype}
    return accelerator


def compile_blocks(model: nn.Module) -> None:
    """Compiles the transformers' blocks, each for itself; equal ones share their code."""
    # Blocks with a stochastic depth of their own count as different. Since torch 2.7 this is `recompile_limit` too.
    torch._dynamo.config.cache_size_limit = 64
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(fullgraph=True)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed's engine wraps the model."""
    return accelerator.distributed_type == "DEEPSPEED"


def deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's settings, to be changed before `prepare`."""
    config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    return config


def precision_of(accelerator: Accelerator) -> str:
    """'fp32', 'bf16' or 'fp16'."""
    if uses_deepspeed(accelerator):
        autocast = deepspeed_config(accelerator)["torch_autocast"]
        return {"bfloat16": "bf16", "float16": "fp16"}[autocast["dtype"]] if autocast["enabled"] else "fp32"
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def dtype_of(accelerator: Accelerator) -> torch.dtype:
    """In which matrix products are made."""
    return _DTYPES.get(precision_of(accelerator), torch.float32)


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The precision, for calls of a model that is not prepared or that FSDP2 shards."""
    dtype = dtype_of(accelerator)
    return nullcontext() if dtype == torch.float32 else torch.autocast(accelerator.device.type, dtype)


class Normalise:
    """uint8 pixels -> floating point with ImageNet's mean and deviation, on the device, which holds the constants."""

    def __init__(self, device: torch.device) -> None:
        self.mean, self.std = (
            255 * torch.tensor(each, device=device).view(3, 1, 1, 1)
            for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def __call__(self, video: Tensor) -> Tensor:
        """[..., 3, T, H, W] uint8 -> fp32 of the same shape."""
        return (video - self.mean) / self.std
