"""Throughput of training: time and FLOPs of a step, the share of the device's peak, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from adamae_sampler.losses import HeadInputs

try:
    import resource
except ImportError:  # Windows
    import psutil

    resource = None  # type: ignore[assignment]

# Peak of dense bf16 matrix products in FLOP/s, from data sheets. Keys are parts of the names that drivers report.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A10G": 70e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 125e12,  # fp16
}


def peak_of(name: str) -> float | None:
    """Peak of a device in FLOP/s; None for a name that is not in the table. The longest match counts."""
    found = [known for known in PEAKS if known in name]
    return PEAKS[max(found, key=len)] if found else None


def forward_flops(model: nn.Module, *shape: int) -> float:
    """Floating-point operations of matrix products and attention in one forward pass, for an input of this shape.

    The model stays as it is.
    """
    device = next(model.parameters()).device
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the counter does not know every fused attention kernel
        FakeTensorMode() as shapes_alone,  # only shapes: no computing, no random numbers, no memory
        FlopCounterMode(display=False) as counter,
    ):
        named = [*model.named_parameters(), *model.named_buffers()]
        weights: dict[str, Tensor] = {name: shapes_alone.from_tensor(tensor) for name, tensor in named}
        out = functional_call(model, weights, torch.empty(shape, device=device))
        if isinstance(out, tuple) and isinstance(out[0], HeadInputs):
            linear(*out[0])  # the loss computes this product
    return float(counter.get_total_flops())


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of a GPU since the last call, or of this process since its start if the device is the CPU."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 2**30
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def utilisation(flops_of_clip: float, clips_per_second: float, devices: int, device: torch.device) -> dict[str, float]:
    """`tflops`: TFLOP/s of each device in training; `mfu`: the same as a share of the peak, if the peak is known.

    A step counts as three forward passes. Recomputed activations do not count.

    Args:
        flops_of_clip: floating-point operations of a forward pass of one clip.
        clips_per_second: pace over all devices.
        devices: number of devices.
        device: one of the devices.
    """
    rate = 3 * flops_of_clip * clips_per_second / devices
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_of(name)
    return {"tflops": rate / 1e12} | ({"mfu": rate / peak} if peak else {})


class Clock:
    """Seconds of steps and of waiting for data since the last reading.

    Args:
        clips: clips of a step over all devices.
        first_step: number of steps done before.
    """

    def __init__(self, clips: int, first_step: int) -> None:
        self._clips = clips
        self._step = first_step
        self._data = 0.0
        self._since = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times the wait for a batch."""
        began = time.perf_counter()
        yield
        self._data += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of an evaluation or a checkpoint."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self, done: int) -> dict[str, float | None]:
        """Mean times and pace since the last reading."""
        now, steps = time.perf_counter(), done - self._step
        seconds, data = now - self._since, self._data
        self._since, self._step, self._data = now, done, 0.0
        return {
            "step_time": seconds / steps,
            "data_time": data / steps,
            "clips_per_second": steps * self._clips / seconds,
        }
