"""Where a training step's time goes on the device: by family of kernels, as torch's profiler tells.

    python -m benchmarks.stages.step_profile --output runs/gpu

Also the attention kernels that ran, and how often the host waited for the device. In a rehearsal on a
CPU the "kernels" are PyTorch's operators.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from adamae_sampler.attention import prefer_cudnn
from benchmarks.core.rows import RowWriter, device_name, read_rows
from benchmarks.core.timing import own_stream
from benchmarks.core.worker import Worker, WorkFailed
from benchmarks.stages.common import Failures, Told, parser, told
from benchmarks.steps.options import FAST
from benchmarks.steps.step import StepCase
from benchmarks.suites.cpu import QUICK_STEP
from benchmarks.suites.measure import release

STAGE = "profile"
FAMILIES = (  # the first that a kernel's name matches; names as torch 2.11, cuDNN 9.19 and cuBLAS 13.1 have them
    ("package", r"(?-i:^_[a-z]\w*_kernel)|adamae_sampler::"),
    ("attention", r"sdpa|flash_(fwd|bwd)|fmha|compute_dot_do_o|convert_dq_to_16bits|_attention"),
    ("convolution", r"(fprop|dgrad|wgrad)|convolve|conv\w*3d|convolution|nchwToNhwc|nhwcToNchw|nhwcAddPadding|vol2col"),
    ("matrix products", r"nvjet|gemm|cutlass|splitK|gemv|::(add|b)?mm$|linear"),
    ("optimizer", r"multi_tensor|FusedAdam|fused_adam"),
    ("LayerNorm", r"layer_?norm|GammaBeta|RowwiseMoments"),
    ("casts and copies", r"copy|Memcpy|CatArray|::cat$|to_copy"),
    (
        "elementwise",
        r"elementwise|gelu|dropout|masked_scale|reduce|softmax|Functor|triton_|index|gather|fill|Memset|::",
    ),
)
OTHER = "other"
_ATTENTION = (("cuDNN", r"cudnn"), ("flash", r"flash"), ("memory-efficient", r"fmha|efficient"), ("math", r""))
_STEP = "training step"  # as the trace names it
_WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize")
_LIMIT_S = 120.0


@dataclass(frozen=True)
class Share:
    """A part of a step."""

    case: str
    clips: int
    kind: str  # "family", "attention" or "waits"
    name: str  # of the family, or of the attention's implementation
    calls: float  # in one step
    seconds: float | None  # on the device, in one step; None where only calls count
    share: float | None  # of all families'
    device: str
    torch: str
    commit: str


class Kernel(NamedTuple):
    """A kernel that ran on the device."""

    name: str
    seconds: float


def family_of(name: str) -> str:
    """The family of a kernel."""
    return next((family for family, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile_step(case: StepCase, device: torch.device, commit: str) -> Iterator[Share]:
    """The shares of one step; three are profiled after two others."""
    count = 3
    with own_stream(device), prefer_cudnn():
        step = case.make(device)
        for _ in range(2):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as trace:
            for _ in range(count):
                with record_function(_STEP):
                    step()
        events = list(trace.events())
    del step  # holds the model, whose memory is given back here
    release(device)
    facts = device_name(device), torch.__version__, commit
    for kind, name, calls, seconds, share in shares(events, device, count):
        yield Share(case.name, case.clips, kind, name, calls, seconds, share, *facts)


def shares(
    events: list[Any], device: torch.device, count: int
) -> Iterator[tuple[str, str, float, float | None, float | None]]:
    """Kind, name, calls, seconds and share, from the events of `count` steps."""
    kernels = list(kernels_of(events, device))
    if not kernels:
        raise RuntimeError("the profiler saw nothing run on the device")
    total = sum(kernel.seconds for kernel in kernels)

    def numbers(found: Sequence[Kernel]) -> tuple[float, float, float]:
        seconds = sum(kernel.seconds for kernel in found)
        return len(found) / count, seconds / count, seconds / total

    by_family: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_family[family_of(kernel.name)].append(kernel)
    for family in sorted(by_family, key=lambda name: -numbers(by_family[name])[1]):
        yield "family", family, *numbers(by_family[family])
    attention: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in by_family.get("attention", ()):
        attention[attention_of(kernel.name)].append(kernel)
    for name, found in attention.items():
        yield "attention", name, *numbers(found)
    waits = waits_of(events)
    yield "waits", ", ".join(sorted(waits)) or "none", sum(waits.values()) / count, None, None


def kernels_of(events: Iterable[Any], device: torch.device) -> Iterator[Kernel]:
    """Seconds of each kernel on the device; on a CPU of each operator, without the operators that it called."""
    for event in events:
        if device.type == "cuda" and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            yield Kernel(event.name, event.device_time_total * 1e-6)
        if device.type == "cpu" and event.self_cpu_time_total and "::" in event.name and "engine" not in event.name:
            yield Kernel(event.name, event.self_cpu_time_total * 1e-6)


def attention_of(name: str) -> str:
    """Which implementation an attention kernel belongs to."""
    return next(found for found, pattern in _ATTENTION if re.search(pattern, name, re.IGNORECASE))


def waits_of(events: Iterable[Any]) -> Counter[str]:
    """How often the host waited for the device within the steps, by what it called."""
    steps = [event.time_range for event in events if event.name == _STEP and event.device_type == DeviceType.CPU]
    inside = (
        event.name
        for event in events
        if _WAITS.search(event.name) and any(step.start <= event.time_range.start < step.end for step in steps)
    )
    return Counter(inside)


def profiled_cases(quick: bool) -> list[StepCase]:
    """The steps that are profiled: exact and fast, and exact with few clips."""
    step = QUICK_STEP if quick else StepCase()
    return list(dict.fromkeys((step, replace(step, **FAST), replace(step, clips=min(step.clips, 16)))))


def main(where: Told) -> int:
    """Profiles what has no rows yet; the number of steps that failed."""
    path, failed = where.file(STAGE), Failures(STAGE, where)
    with RowWriter(path, Share, read_rows(path, Share)) as rows, Worker() as worker:
        done = {row.case for row in rows.rows if row.kind == "waits"}  # the last of a step's
        for case in profiled_cases(where.quick):
            if case.name in done:
                continue
            try:
                found = list(worker.stream(profile_step, case, where.device, where.commit, limit_s=_LIMIT_S))
            except WorkFailed as error:
                failed.add(case.name, error)
                continue
            print(case.name)
            for row in found:
                rows.add(row)
                time = "" if row.seconds is None else f"{1e3 * row.seconds:8.2f} ms {row.share:6.1%}"
                print(f"  {row.kind:12s} {row.name:40.40s} {row.calls:7.1f} {time}", flush=True)
    return failed.count


if __name__ == "__main__":
    sys.exit(min(main(told(parser(__doc__).parse_args())), 1))
