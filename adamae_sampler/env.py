"""Versions, devices and the backend in force, for a bug report: python -m adamae_sampler.env

The report holds no path, host name or user name, so it can be pasted as it is.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

import torch

from adamae_sampler import __version__
from adamae_sampler.attention import KERNEL_NAMES
from adamae_sampler.ops.backend import ENVIRONMENT_VARIABLE, backend_for, device_obstacle, get_backend, use_backend

PACKAGES = ("triton", "timm", "einops", "safetensors", "transformers")


def main() -> None:
    """Prints the report."""
    print(format_report(collect()))


def collect() -> dict[str, str]:
    """Names and values of the report, in its order. Never raises for a package, a GPU or a driver that is absent."""
    found = devices()
    return {
        "adamae_sampler": __version__,
        "Python": platform.python_version(),
        "OS": platform.platform(),
        "torch": torch.__version__,
        **torch_builds(),
        **{name: package_version(name) for name in PACKAGES},
        "NVIDIA driver": driver_version(),
        **{str(device): describe_device(device) for device in found},
        **{f'backend "auto" on {device}': describe_auto(device) for device in found},
        "backend in force": get_backend(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE) or "not set",
        "attention preference": ", ".join(KERNEL_NAMES.values()),
    }


def format_report(report: dict[str, str]) -> str:
    """One line for each entry: the name, padded to the longest one, two spaces, the value."""
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in report.items())


def package_version(name: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def torch_builds() -> dict[str, str]:
    """The GPU libraries that torch was built for."""
    if torch.version.hip is not None:
        return {"torch's ROCm": torch.version.hip}
    return {
        "torch's CUDA": torch.version.cuda or "none: a CPU build",
        "torch's cuDNN": str(torch.backends.cudnn.version() or "none"),
    }


def devices() -> list[torch.device]:
    """All CUDA devices. Without any, torch's other accelerator; without that too, the CPU."""
    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [accelerator or torch.device("cpu")]


def describe_device(device: torch.device) -> str:
    """Model, compute capability and memory of a CUDA device; architecture and threads of a CPU; type of others."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"compute capability {properties.major}.{properties.minor}"
        return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


def describe_auto(device: torch.device) -> str:
    """The implementation that "auto" takes for fp32 tensors on a device, with the reason if that is plain PyTorch."""
    with use_backend("auto"):
        if backend_for(torch.empty(0, device=device)) == "triton":
            return "Triton kernels"
    # Triton's interpreter removes the obstacle, but "auto" never takes the interpreter.
    return f"plain PyTorch, because {device_obstacle(device) or 'the tensors are on no NVIDIA GPU'}"


def driver_version() -> str:
    """The driver version that nvidia-smi states, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, PermissionError):
        return "no nvidia-smi"
    except subprocess.TimeoutExpired:
        return "unknown: nvidia-smi gave no answer in 30 seconds"
    if answer.returncode:
        return f"unknown: nvidia-smi ended with code {answer.returncode}"
    return ", ".join(sorted(set(answer.stdout.split()))) or "unknown: nvidia-smi lists no GPU"


if __name__ == "__main__":
    main()
