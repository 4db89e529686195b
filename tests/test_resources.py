"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100: registers and spills as the binaries tell."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own, where the kernels are not interpreted; any warning of the compiler is an error."""
    output = tmp_path_factory.mktemp("resources") / "rows.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "kernel_resources.py"), str(output)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return list(csv.DictReader(output.open()))


def test_every_kernel_is_compiled_for_every_architecture(rows):
    sources = "".join(path.read_text() for path in (ROOT / "adamae_sampler" / "ops").glob("*.py"))
    defined = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert len(defined) >= 9
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert {row["kernel"] for row in rows if row["architecture"] == architecture} == defined


def test_no_kernel_spills(rows):
    assert [row for row in rows if int(row["spilled_bytes"])] == []


def test_kernels_leave_room_for_others_on_a_multiprocessor(rows):
    """At least 16 warps fit by registers (65536 of them) and by shared memory (100 KB where it is least)."""
    for row in rows:
        warps = int(row["threads"]) // 32
        assert 65536 // (int(row["registers"]) * int(row["threads"])) * warps >= 16, row
        assert 100 * 1024 // max(int(row["shared_bytes"]), 1) * warps >= 16, row
