"""Devices and processes, and pixels on them."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's handle on devices and processes; precision is 'auto', 'fp32' or 'bf16'."""
    # Said outright, since torchrun without a GPU would otherwise start processes that do not know of each other.
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if good else "fp32"
    return Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
    )


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


def describe_precision(accelerator: Accelerator) -> str:
    """'fp32' or 'bf16'."""
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)
