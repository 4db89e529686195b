"""The choice of an op's implementation: its Triton kernel or its plain-PyTorch reference.

"auto", the default, takes the kernels for fp32, fp16, bf16 and uint8 tensors on NVIDIA GPUs of compute capability 8.0
and newer, and the reference everywhere else. "torch" always takes the reference. "triton" takes the kernels or raises.
The environment variable ADAMAE_SAMPLER_BACKEND sets the choice at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheels for this platform, so the reference runs
    triton = tl = None

__all__ = [
    "backend_for",
    "device_obstacle",
    "get_backend",
    "jit",
    "launch",
    "next_power_of_2",
    "set_backend",
    "tl",
    "use_backend",
]

Backend = Literal["auto", "triton", "torch"]
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
MIN_CAPABILITY = (8, 0)
ENVIRONMENT_VARIABLE = "ADAMAE_SAMPLER_BACKEND"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _checked(backend: str, source: str) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"{source}={backend!r}, expected one of {', '.join(map(repr, get_args(Backend)))}.")
    return cast(Backend, backend)


_backend = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
# Triton's interpreter runs kernels on CPU tensors, for tests. Triton reads the variable when a kernel is defined.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def get_backend() -> Backend:
    """The choice in force: "auto", "triton" or "torch". `backend_for` tells which implementation a tensor then gets."""
    return _backend


def set_backend(backend: Backend) -> None:
    """Chooses the implementation of all ops, for the whole process.

    Raises:
        ValueError: not one of "auto", "triton", "torch".
    """
    global _backend
    _backend = _checked(backend, "backend")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the implementation within a `with` block, for the whole process.

    Raises:
        ValueError: not one of "auto", "triton", "torch".
    """
    before = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def backend_for(x: Tensor, *others: Tensor, obstacle: str = "") -> Literal["triton", "torch"]:
    """The implementation that an op runs on these tensors: "triton" or "torch".

    Args:
        x: one of the tensors.
        others: the other tensors, on the same device.
        obstacle: the reason why the op has no kernel for its input; empty if it has one.

    Raises:
        TypeError: "triton" is asked for and a tensor is neither fp32, nor half precision, nor uint8.
        ValueError: "triton" is asked for and the device cannot run it, or the op has no kernel for its input.
    """
    if _backend == "torch":
        return "torch"
    device, tensors = x.device, (x, *others)
    if _backend == "auto":
        takes = device.type == "cuda" and not obstacle and all(each.dtype in KERNEL_DTYPES for each in tensors)
        return "triton" if takes and not device_obstacle(device) else "torch"
    for each in tensors:
        if each.dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"the Triton kernels take float32, float16, bfloat16 and uint8, got {each.dtype}. Cast the tensor, or "
                'use set_backend("auto"), which takes plain PyTorch for other dtypes.'
            )
    obstacle = obstacle or device_obstacle(device)
    if obstacle:
        raise ValueError(
            f'backend "triton" was asked for, but {obstacle}. Use set_backend("auto"), which takes plain PyTorch '
            "where the kernels do not run."
        )
    return "triton"


@torch.compiler.assume_constant_result
def device_obstacle(device: torch.device) -> str:
    """The reason why kernels do not run on a device; empty if they do."""
    return _find_obstacle(device)


@cache
def _find_obstacle(device: torch.device) -> str:
    if triton is None:
        return "Triton is not installed (pip install triton, on Linux)"
    if INTERPRETED:
        return _interpreter_obstacle()
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return f"the tensors are on {device}, and that is no NVIDIA GPU that this process can use"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"{device} has compute capability {capability}, and the kernels are made for {MIN_CAPABILITY} and newer"
    return ""


def _interpreter_obstacle() -> str:
    """The reason why Triton's interpreter does not run the kernels; empty if it does."""
    import numpy  # the interpreter needs it; the package does not

    try:
        _needs_of_kernels[(1,)](1)
    except triton.runtime.errors.InterpreterError as error:
        return (
            f"the interpreter of Triton {triton.__version__} does not run the kernels with NumPy {numpy.__version__}: "
            f"{error}. Install triton>=3.7, or numpy<2.4 with Triton 3.3 to 3.6, or unset TRITON_INTERPRET"
        )
    return ""


def jit(function: _Function | None = None, **options: Any) -> Any:
    """`triton.jit`. Without Triton it returns the function as it is, and nothing launches the kernel."""
    if function is None:
        return partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


@jit
def _needs_of_kernels(n):  # type: ignore[no-untyped-def]
    """What kernels need and some interpreters lack: a loop up to an argument, and the negation of a boolean."""
    for _ in range(n):
        ~(n > 0)  # noqa: B018


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n. Triton's blocks have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launches `programs` programs of a kernel on the device of its first argument, not on the current device.

    Products and sums are rounded separately, as in the references, in every version of Triton. With
    `enable_fp_fusion=True` a product and a sum may be one instruction.
    """
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **{"enable_fp_fusion": False, **constants})
