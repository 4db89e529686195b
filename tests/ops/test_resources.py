"""Every kernel is compiled ahead of time for sm_80, sm_90 and sm_100; registers and spills are read from the binaries.

Both depend on Triton's version. ADAMAE_SAMPLER_TRITONS may name folders that hold other versions (pip install --no-deps
--target FOLDER triton==3.6.0). Each of them is then tested instead of the installed one.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks import kernel_resources

ROOT = Path(__file__).parents[2]
FOLDERS = os.environ.get("ADAMAE_SAMPLER_TRITONS", "").split(os.pathsep)

LEAST_WARPS = 16  # must fit on a multiprocessor
# Every kernel, dtype and branch of a kernel, but not every size: benchmarks/results has the sizes.
CASES = (
    *("draw_mask, 1568 tokens", "draw_mask, 18432 tokens", "sampling_loss", "token_scores, 768 wide, bfloat16"),
    *("add_norm, 768 wide, bfloat16", "add_norm, 1024 wide, float32", "gather_tokens, 768 wide, float16"),
    *("gather_tokens, 768 wide, bfloat16, 4 masks of a clip", "assemble_tokens, 384 wide, float32, concat"),
    *("assemble_tokens, 384 wide, bfloat16, restore", "reconstruction_error, float32, float32 video"),
    *("reconstruction_error, bfloat16, uint8 video", "reconstruction_error, bfloat16, uint8 video, raw l1"),
    "patch_tokens, uint8 video, bfloat16",
)
COMPILE = """
import sys
from benchmarks import kernel_resources
kernel_resources.CASES = {name: kernel_resources.CASES[name] for name in %r}
kernel_resources.ARCHITECTURES = %r
kernel_resources.main()
"""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: Path(folder).name or "installed")
@pytest.mark.slow
def test_resources_of_every_kernel(folder, tmp_path):
    """One test for each Triton: compilation is slow, and tests in other processes would repeat it."""
    rows = compiled(folder, tmp_path / "rows.csv")
    assert_every_kernel_is_compiled(rows, {f"sm_{each}" for each in architectures(folder)})
    assert [row for row in rows if int(row["spilled_bytes"])] == []
    assert_the_error_kernel_moves_16_bytes_at_a_time(rows)
    assert_kernels_leave_room_for_others_on_a_multiprocessor(rows)


def architectures(folder):
    """All of them for the installed Triton, one for each other: benchmarks/results has the rest."""
    return (90,) if folder else kernel_resources.ARCHITECTURES


def compiled(folder, output):
    """The rows for one Triton, from a new process in which the kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = filter(None, [folder, str(ROOT), environment.get("PYTHONPATH")])
    command = [sys.executable, "-c", COMPILE % (CASES, architectures(folder)), str(output)]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(output.open()))


def assert_every_kernel_is_compiled(rows, known):
    sources = "".join(path.read_text() for path in (ROOT / "adamae_sampler" / "ops").glob("*.py"))
    defined = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert len(defined) >= 9
    assert {row["architecture"] for row in rows} == known
    for architecture in known:
        assert {row["kernel"] for row in rows if row["architecture"] == architecture} == defined


def assert_the_error_kernel_moves_16_bytes_at_a_time(rows):
    """Only its index and its error move in smaller pieces. Both passes take less than 2/3 of 2408 instructions a token.

    2408 is the number of an earlier version of the kernel.
    """
    mine = [row for row in rows if row["case"] == "reconstruction_error, bfloat16, uint8 video"]
    assert {row["loads"] for row in mine if row["kernel"] == "_error_kernel"} == {"9x16 1x8"}  # 48 values, 48 pixels
    passes = {
        (row["kernel"], row["stores"]): int(row["instructions"]) for row in mine if row["architecture"] == "sm_90"
    }
    scale = passes["_scale_rows_kernel", "2x16"]  # a loop that runs three times
    assert passes["_error_kernel", "6x16 1x4"] + 3 * scale < 2408 * 2 / 3


def assert_kernels_leave_room_for_others_on_a_multiprocessor(rows):
    """Enough warps fit into the 65536 registers and the shared memory, which is 100 KB on the smallest GPUs."""
    for row in rows:
        warps = int(row["threads"]) // 32
        assert 65536 // (int(row["registers"]) * int(row["threads"])) * warps >= LEAST_WARPS, row
        assert 100 * 1024 // max(int(row["shared_bytes"]), 1) * warps >= LEAST_WARPS, row
