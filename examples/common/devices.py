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
    """The Accelerator for this launch: a single process, DDP, FSDP2 or DeepSpeed.

    Args:
        precision: 'auto', 'fp32', 'bf16' or 'fp16'.
        compiled: whether `prepare` compiles the model as a whole.
        tracker: a service that gets the metrics too, 'wandb' or 'trackio'.

    Raises:
        ValueError: the precision is not available, the tracker is not installed, or the launch file
            does not fit the GPUs.
    """
    # Passed explicitly: without a GPU, torchrun's processes would otherwise not join one process group.
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
        # DeepSpeed 0.19 never lowers the loss scale under autocast: after one overflow it skips every step.
        raise ValueError("--precision fp16 does not work with DeepSpeed; use --precision bf16, DDP or FSDP2.")
    accelerator = Accelerator(
        cpu=on_cpu and not with_deepspeed,
        mixed_precision="no" if with_deepspeed or precision == "fp32" else precision,
        log_with=tracker,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if compiled else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # buffers are constants
    )
    sharded, alone = accelerator.distributed_type in ("DEEPSPEED", "FSDP"), accelerator.num_processes == 1
    if (with_deepspeed or with_fsdp) and (not sharded or alone):
        gpus = torch.accelerator.device_count()
        raise ValueError(
            "the launch file is for FSDP2 or DeepSpeed, which Accelerate runs on two or more GPUs; "
            f"found {gpus}. Use examples/launch/one_machine.yaml, or no launch file."
        )
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("the launch file has FSDP version 1; set fsdp_version: 2, as in examples/launch/fsdp2.yaml.")
    if with_fsdp and precision != "fp32":  # blocks are gathered in half precision; gradients are summed in fp32
        policy = MixedPrecisionPolicy(_DTYPES[precision], torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if with_deepspeed:  # autocast over fp32 weights, as without DeepSpeed, in place of half-precision weights
        dtype = str(_DTYPES.get(precision, torch.bfloat16)).removeprefix("torch.")
        deepspeed_config(accelerator)["torch_autocast"] = {"enabled": precision != "fp32", "dtype": dtype}
    return accelerator


def compile_blocks(model: nn.Module) -> None:
    """Compiles each transformer block by itself; equal blocks share the compiled code."""
    # Blocks with different drop-path rates are compiled apart. Since torch 2.7 this is also `recompile_limit`.
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
    """The precision in use: 'fp32', 'bf16' or 'fp16'."""
    if uses_deepspeed(accelerator):
        autocast = deepspeed_config(accelerator)["torch_autocast"]
        return {"bfloat16": "bf16", "float16": "fp16"}[autocast["dtype"]] if autocast["enabled"] else "fp32"
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def dtype_of(accelerator: Accelerator) -> torch.dtype:
    """The dtype of matrix products."""
    return _DTYPES.get(precision_of(accelerator), torch.float32)


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The autocast context for calls of a model that is not prepared, or that FSDP2 shards."""
    dtype = dtype_of(accelerator)
    return nullcontext() if dtype == torch.float32 else torch.autocast(accelerator.device.type, dtype)


class Normalise:
    """Normalises uint8 pixels with ImageNet's mean and standard deviation, which are kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.mean, self.std = (
            255 * torch.tensor(each, device=device).view(3, 1, 1, 1)
            for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def __call__(self, video: Tensor) -> Tensor:
        """[..., 3, T, H, W] uint8 -> fp32 of the same shape."""
        return (video - self.mean) / self.std
