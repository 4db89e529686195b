"""Runs NVIDIA's own tools on the kernels: compute-sanitizer on one case of each, ncu on the two largest.

python -m benchmarks.stages.tools sanitizer --output runs/gpu
python -m benchmarks.stages.tools ncu --output runs/gpu
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import adamae_sampler.ops
from benchmarks.core.rows import RowWriter, device_name, read_rows
from benchmarks.stages.common import Failures, Told, parser, told
from benchmarks.stages.every_op import DONE

CHECKS = ("memcheck", "racecheck")  # addresses; shared memory
NCU_KERNELS = ("_error_kernel", "_draw_mask_kernel")
NCU_METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
ERRORS = "errors"  # the metric of a check
Count = tuple[str, int | None, str, float, str]  # kernel, launch, metric, value, unit
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (?:\d+ hazards? displayed \()?(\d+) errors?")
_ERROR_CODE = 86  # what compute-sanitizer is to end with


@dataclass(frozen=True)
class Finding:
    """A number that a tool counted."""

    tool: str  # its name; compute-sanitizer's check
    kernel: str  # its name; "all of the package" for a check
    launch: int | None  # the number of the launch among the kernel's; None for a check
    metric: str
    value: float
    unit: str
    device: str
    torch: str
    commit: str


def kernel_names() -> list[str]:
    """Every kernel of the package, by its name in the source."""
    folder = Path(next(iter(adamae_sampler.ops.__path__)))
    found = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return re.findall(r"^def (_\w+_kernel)\(", found, re.MULTILINE)


def sanitizer_command(check: str, log: Path) -> list[str]:
    """The command of one check. It covers the package's kernels alone: PyTorch's own would take minutes."""
    kernels = (part for name in kernel_names() for part in ("--kernel-name", f"kernel_substring={name}"))
    options = ["--tool", check, "--error-exitcode", str(_ERROR_CODE), "--print-limit", "20", "--log-file", str(log)]
    return ["compute-sanitizer", *options, *kernels, sys.executable, "-m", "benchmarks.stages.every_op"]


def sanitize(check: str, where: Told) -> list[Count]:
    """Runs a check; the number of its errors. Raises RuntimeError, with the reason, where it did not get through."""
    log = where.output / f"{check}.txt"
    # Without a cache every tensor has an allocation of its own, whose end the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        sanitizer_command(check, log), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    report = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    print(done.stdout[-2000:], report[-2000:], sep="\n", flush=True)
    counted = _SUMMARY.findall(report)
    if not counted or (DONE not in done.stdout and not int(counted[-1])):
        raise RuntimeError(f"compute-sanitizer ended with code {done.returncode}, without a summary of every op")
    return [("all of the package", None, ERRORS, int(counted[-1]), "")]


def ncu_command(log: Path) -> list[str]:
    """Counters of the launches of the two kernels; the clocks of the GPU are left as they are."""
    options = ["--kernel-name", f"regex:^({'|'.join(NCU_KERNELS)})$", "--metrics", ",".join(NCU_METRICS)]
    options += ["--csv", "--page", "raw", "--clock-control", "none", "--log-file", str(log)]
    return ["ncu", *options, sys.executable, "-m", "benchmarks.stages.every_op", "--full"]


def counters(lines: Iterable[str]) -> list[Count]:
    """Kernel, launch, metric, value and unit, from ncu's raw page as CSV, whose second line has the units."""
    rows = csv.reader(line for line in lines if line.startswith('"'))
    header, units = next(rows, []), next(rows, [])
    seen: dict[str, int] = {}
    found: list[Count] = []
    for row in rows:
        kernel = row[header.index("Kernel Name")].partition("(")[0]
        seen[kernel] = seen.get(kernel, -1) + 1
        for metric in NCU_METRICS:
            place = header.index(metric)
            if row[place] != "n/a":
                found.append((kernel, seen[kernel], metric, float(row[place].replace(",", "")), units[place]))
    return found


def count(where: Told) -> list[Count]:
    """Runs ncu; see `counters`. Raises RuntimeError where it counted nothing."""
    log = where.output / "ncu.txt"
    done = subprocess.run(ncu_command(log), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    report = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = counters(report.splitlines())
    if not found:
        print(done.stdout[-2000:], report[-2000:], sep="\n", flush=True)
        raise RuntimeError(f"ncu ended with code {done.returncode} and counted nothing")
    return found


def main(tool: str, where: Told) -> int:
    """Runs what has no rows yet; 1 if something failed or a check found errors."""
    path, failed = where.file(tool), Failures(tool, where)
    facts = device_name(where.device), torch.__version__, where.commit
    with RowWriter(path, Finding, read_rows(path, Finding)) as rows:
        done = {row.tool for row in rows.rows}
        for name in CHECKS if tool == "sanitizer" else ("ncu",):
            if name in done:
                continue
            try:
                found = count(where) if name == "ncu" else sanitize(name, where)
            except (OSError, RuntimeError, ValueError) as error:
                failed.add(name, error)
                continue
            for kernel, launch, metric, value, unit in found:
                rows.add(Finding(name, kernel, launch, metric, value, unit, *facts))
                print(f"{name}: {kernel} {metric} {value:g} {unit}", flush=True)
        for row in rows.rows:
            if row.metric == ERRORS and row.value:
                failed.add(row.tool, f"{row.value:.0f} errors, see {row.tool}.txt")
    return min(failed.count, 1)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("tool", choices=("sanitizer", "ncu"))
    given = arguments.parse_args()
    sys.exit(main(given.tool, told(given)))
