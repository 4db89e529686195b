"""The machine, its versions, and its ceilings: a large copy and a large product of matrices.

python -m benchmarks.stages.machine --output runs/gpu
"""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from dataclasses import dataclass

import torch

from benchmarks.core.rows import device_name, version_of, write_rows
from benchmarks.core.timing import copy_calls, own_stream, time_graph, time_wall
from benchmarks.stages.common import Told, parser, told


@dataclass(frozen=True)
class Machine:
    """Versions and ceilings; empty where there is none."""

    device: str
    capability: str
    memory_bytes: int | None
    multiprocessors: int | None
    copy_bytes_per_s: float  # of a copy of gigabytes within the device, read and written bytes together
    product_flops: float  # of a product of two 8192 x 8192 matrices in bf16; small and fp32 on a CPU
    driver: str
    cuda: str
    cudnn: str
    torch: str
    triton: str
    timm: str
    numpy: str
    python: str
    commit: str
    date: str


def main(where: Told) -> None:
    """Measures and writes the row."""
    device, gpu = where.device, where.device.type == "cuda"
    timer = time_graph if gpu else time_wall
    copied, side, dtype = (8 * 2**30, 8192, torch.bfloat16) if gpu else (2**26, 512, torch.float32)
    with own_stream(device):
        copy = timer(copy_calls(copied, device), 0.5)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = timer([lambda: torch.mm(a, b)], 0.5)
    found = torch.cuda.get_device_properties(device) if gpu else None
    machine = Machine(
        device=device_name(device),
        capability=f"{found.major}.{found.minor}" if found else "",
        memory_bytes=found.total_memory if found else None,
        multiprocessors=found.multi_processor_count if found else None,
        copy_bytes_per_s=copied / copy.median,
        product_flops=2 * side**3 / product.median,
        driver=driver_version(),
        cuda=torch.version.cuda or "",
        cudnn=str(torch.backends.cudnn.version() or ""),
        torch=torch.__version__,
        **{name: version_of(name) for name in ("triton", "timm", "numpy")},
        python=platform.python_version(),
        commit=where.commit,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    write_rows(where.file("machine"), Machine, [machine])
    for name, value in vars(machine).items():
        print(f"{name:16s} {value:.4g}" if isinstance(value, float) else f"{name:16s} {value}")


def driver_version() -> str:
    """NVIDIA's driver, as nvidia-smi tells; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main(told(parser(__doc__).parse_args()))
