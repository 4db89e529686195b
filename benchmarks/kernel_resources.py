"""Compiles every kernel ahead of time, without a GPU, and reads registers and spills from the binaries.

    python -m benchmarks.kernel_resources [FILE.csv]    # ViT-B's sizes, for sm_80, sm_90 and sm_100

The ops run on CPU tensors with Triton's launch replaced by its compilation, so what is compiled is exactly what a
GPU would launch: the same arguments, constants, warps and specialisations. Rows go to the file given, else to
benchmarks/results/kernel_resources.csv, in which the rows of other Tritons stay. For another Triton than the installed
one: pip install --no-deps --target DIR triton==3.6.0, and PYTHONPATH=DIR. A warning of the compiler is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import adamae_sampler.ops  # noqa: F401  # registers the operators
from benchmarks.core.rows import RESULTS, read_rows, write_rows

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
ARCHITECTURES = (80, 90, 100) if _VERSION >= (3, 3) else (80, 90)  # what this Triton's assembler knows
CUOBJDUMP, NVDISASM = (Path(next(iter(nvidia.__path__))) / "bin" / name for name in ("cuobjdump", "nvdisasm"))
OPS = torch.ops.adamae_sampler


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel on one architecture. Spills are bytes per thread, shared memory is bytes per program.

    Instructions are those of the binary, whose loops count once. Loads and stores are those of global memory, as
    "number x bytes" of a thread, the widest first.
    """

    case: str
    kernel: str
    architecture: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    loads: str
    stores: str
    triton: str


class CompileOnly:
    """A driver for a GPU that is not there, of a given architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        """A number of its own for each architecture, since compiled kernels are kept by device."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """No stream: nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def compiled_not_launched(architecture: int) -> Iterator[list[tuple[str, Any]]]:
    """Within it, launching a kernel compiles it; the list fills with (kernel's name, compiled kernel)."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(CompileOnly(architecture))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield found
    finally:
        driver._active = None  # whatever the machine has, looked up when next needed


def read_resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack a thread that spills go to, bytes of shared memory) of a binary."""
    text = _read(cubin, CUOBJDUMP, "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


def read_instructions(cubin: bytes) -> tuple[int, str, str]:
    """(number of instructions, loads, stores) of a binary."""
    text = _read(cubin, NVDISASM, "-c")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    return sum(name != "NOP" for name in names), _widths(names, "LDG"), _widths(names, "STG")


def _read(cubin: bytes, tool: Path, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _widths(names: list[str], kind: str) -> str:
    """Number and width in bytes of the instructions of a kind: "9x16 1x8"."""
    bits = [re.search(r"\.[US]?(8|16|64|128|256)\b", name) for name in names if name.split(".")[0] == kind]
    found = Counter(int(each[1]) // 8 if each else 4 for each in bits)
    return " ".join(f"{found[width]}x{width}" for width in sorted(found, reverse=True))


def draw_mask(num_tokens: int, num_visible: int, noise: bool = False) -> None:
    """The draw and the gradient of its log-probabilities."""
    scores = torch.empty(CLIPS, num_tokens)
    seed = torch.empty(2, dtype=torch.int64)
    OPS.draw_mask(scores, num_visible, scores, None) if noise else OPS.draw_mask(scores, num_visible, None, seed)
    OPS.log_softmax_backward(scores, scores)


def gather_tokens(width: int, dtype: torch.dtype, masks: int = 1) -> None:
    """The gather, and both ways back: to the tokens, and to a position table shared by the clips."""
    x, idx = torch.empty(CLIPS, N, width, dtype=dtype), torch.empty(CLIPS * masks, K, dtype=torch.int64)
    grad = OPS.gather_tokens(x, idx, torch.empty(1, N, width))
    OPS.scatter_tokens(grad, idx, CLIPS, N, dtype)
    OPS.scatter_tokens_sum(grad, idx, N, torch.float32)


def assemble_tokens(width: int, dtype: torch.dtype, restore: bool) -> None:
    """The decoder's input, and the sum that is the mask token's gradient."""
    visible, idx = torch.empty(CLIPS, K, width, dtype=dtype), torch.empty(CLIPS, N, dtype=torch.int64)
    pos, mask_token = torch.empty(1, N, width), torch.empty(width)
    grad = OPS.assemble_tokens(visible, mask_token, pos, idx[:, :K], idx[:, K:], restore)
    OPS.sum_masked_rows(grad, idx[:, :K], restore)


def reconstruction_error(
    dtype: torch.dtype, video_dtype: torch.dtype, kind: str, normalize: bool, masks: int = 1
) -> None:
    """The error, alone and with its unit gradient, and the gradient, for 2x16x16 patches of three channels."""
    rows = CLIPS * masks
    prediction, idx = torch.empty(rows, N - K, 1536, dtype=dtype), torch.empty(rows, N - K, dtype=torch.int64)
    video = torch.empty(CLIPS, 3, 16, 224, 224, dtype=video_dtype)
    stats = [None, None] if video_dtype == torch.uint8 else [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    how = (kind, normalize, [2, 16, 16], *stats)
    for gradient in (False, True):
        error, unit = OPS.reconstruction_error(prediction, video, idx, *how, gradient)
    OPS.scale_rows(unit, error, 1.0)


def add_norm(width: int, dtype: torch.dtype) -> None:
    """A sum and its norm, with and without a branch, and both ways back."""
    x, weight = torch.empty(CLIPS, N, width, dtype=dtype), torch.empty(width)
    for branch in (x, None):
        _, normed, statistics = OPS.add_norm(x, branch, weight, weight, 1e-6)
        OPS.add_norm_backward(normed, branch, x, weight, statistics)


def patch_tokens(video_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All tokens, and those that are visible; and all tokens small."""
    video = torch.empty(CLIPS, 3, 16, 224, 224, dtype=video_dtype)
    for idx in (None, torch.empty(CLIPS, K, dtype=torch.int64)):
        OPS.patch_tokens(video, idx, [2, 16, 16], dtype, 128.0)
    OPS.thumbnails(video, [2, 16, 16], [1.0] * 3, [0.5] * 3, dtype)


def sampling_loss() -> None:
    """The loss and its gradient."""
    log_probs, idx, error = (
        torch.empty(CLIPS, N),
        torch.empty(CLIPS, N - K, dtype=torch.int64),
        torch.empty(CLIPS, N - K),
    )
    OPS.sampling_loss_backward(OPS.sampling_loss(log_probs, idx, error), log_probs, idx, error)


CLIPS, N, K = 2, 1568, 78  # ViT-B on 16x224x224 at 95%; the number of clips is no constant of any kernel
CASES: dict[str, Callable[[], None]] = {
    "draw_mask, 1568 tokens": lambda: draw_mask(N, K),
    "draw_mask, 1568 tokens, noise given": lambda: draw_mask(N, K, noise=True),
    "draw_mask, 18432 tokens": lambda: draw_mask(18432, 921),
    "sampling_loss": sampling_loss,
    "token_scores, 768 wide, bfloat16": lambda: OPS.token_scores(
        torch.empty(CLIPS, N, 768, dtype=torch.bfloat16), torch.empty(768), torch.empty(1)
    ),
    "add_norm, 768 wide, bfloat16": lambda: add_norm(768, torch.bfloat16),
    "add_norm, 384 wide, bfloat16": lambda: add_norm(384, torch.bfloat16),
    "add_norm, 1024 wide, float32": lambda: add_norm(1024, torch.float32),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
for _name in ("float32", "bfloat16", "float16"):
    _dtype = _DTYPES[_name]
    CASES[f"gather_tokens, 768 wide, {_name}"] = partial(gather_tokens, 768, _dtype)
    for _order in ("concat", "restore"):
        _case = f"assemble_tokens, 384 wide, {_name}, {_order}"
        CASES[_case] = partial(assemble_tokens, 384, _dtype, _order == "restore")
for _name, _video in (
    ("float32", "uint8"),
    ("bfloat16", "uint8"),
    ("float16", "uint8"),
    ("float32",) * 2,
    ("bfloat16",) * 2,
):
    _case = f"reconstruction_error, {_name}, {_video} video"
    CASES[_case] = partial(reconstruction_error, _DTYPES[_name], _DTYPES[_video], "mse", True)
for _video in ("float32", "uint8"):
    CASES[f"patch_tokens, {_video} video, bfloat16"] = partial(patch_tokens, _DTYPES[_video], torch.bfloat16)
_ERROR = "reconstruction_error, bfloat16, uint8 video"
CASES["gather_tokens, 768 wide, bfloat16, 4 masks of a clip"] = partial(gather_tokens, 768, torch.bfloat16, 4)
CASES[f"{_ERROR}, 4 masks of a clip"] = partial(reconstruction_error, torch.bfloat16, torch.uint8, "mse", True, 4)
CASES[f"{_ERROR}, raw l1"] = partial(reconstruction_error, torch.bfloat16, torch.uint8, "l1", False)


def measure(case: str, architecture: int) -> list[Resources]:
    """The resources of a case's kernels on an architecture."""
    with warnings.catch_warnings(), compiled_not_launched(architecture) as compiled:
        warnings.simplefilter("error")
        CASES[case]()
    rows = []
    for name, kernel in compiled:
        registers, spilled, shared = read_resources(kernel.asm["cubin"])
        instructions = read_instructions(kernel.asm["cubin"])
        threads = 32 * kernel.metadata.num_warps
        shared = max(shared, kernel.metadata.shared)
        sizes = (threads, registers, spilled, shared, *instructions)
        rows.append(Resources(case, name, f"sm_{architecture}", *sizes, triton.__version__))
    return rows


def main() -> None:
    """Compiles, prints, and writes the rows."""
    rows = [row for case in CASES for architecture in ARCHITECTURES for row in measure(case, architecture)]
    for row in rows:
        print(
            f"{row.case:40s} {row.kernel:32s} {row.architecture:7s} {row.registers:4d} registers "
            f"{row.spilled_bytes:5d} B spilled {row.shared_bytes:6d} B shared, {row.threads} threads, "
            f"{row.instructions} instructions, loads {row.loads}, stores {row.stores}"
        )
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "kernel_resources.csv"
    others = [row for row in read_rows(output, Resources) if row.triton != triton.__version__]
    write_rows(output, Resources, [*others, *rows])
    print(f"{len(rows)} compiled kernels, {sum(row.spilled_bytes > 0 for row in rows)} that spill; rows in {output}")


if __name__ == "__main__":
    main()
