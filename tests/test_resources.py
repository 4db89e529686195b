"""Every kernel compiled ahead of time for sm_80, sm_90 and sm_100: registers and spills as the binaries tell.

Both depend on Triton's version. ADAMAE_SAMPLER_TRITONS names folders that hold Tritons (pip install --no-deps --target
FOLDER triton==3.6.0), each of which is tested in the place of the installed one.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
ROOT = Path(__file__).parent.parent
FOLDERS = os.environ.get("ADAMAE_SAMPLER_TRITONS", "").split(os.pathsep)

# Bytes of stack that a thread may spill to, and warps that fit a multiprocessor at the least, by version.
LIMITS = {
    "3.2": (8, 12),  # the error kernel takes up to 168 registers there
    "3.6": (8, 16),  # draw_mask of more than one tile spills a value on sm_80
    "newer": (0, 16),
}


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: Path(folder).name or "installed")
def rows(request, tmp_path_factory):
    """In a process of its own, where the kernels are not interpreted."""
    output = tmp_path_factory.mktemp("resources") / "rows.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = filter(None, [request.param, str(ROOT), environment.get("PYTHONPATH")])
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), str(output)]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(output.open()))


def limits(rows):
    version = ".".join(rows[0]["triton"].split(".")[:2])
    return LIMITS.get(version, LIMITS["newer"])


def test_every_kernel_is_compiled_for_every_architecture(rows):
    sources = "".join(path.read_text() for path in (ROOT / "adamae_sampler" / "ops").glob("*.py"))
    defined = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    assert len(defined) >= 9
    known = {"sm_80", "sm_90"} | ({"sm_100"} if not rows[0]["triton"].startswith("3.2.") else set())
    assert {row["architecture"] for row in rows} == known
    for architecture in known:
        assert {row["kernel"] for row in rows if row["architecture"] == architecture} == defined


def test_kernels_do_not_spill(rows):
    most, _ = limits(rows)
    assert [row for row in rows if int(row["spilled_bytes"]) > most] == []
    if most:  # and where one does, it is the one that the table above tells of
        assert sum(int(row["spilled_bytes"]) > 0 for row in rows) <= 1


def test_kernels_leave_room_for_others_on_a_multiprocessor(rows):
    """Enough warps fit by registers (65536 of them) and by shared memory (100 KB where it is least)."""
    _, least = limits(rows)
    for row in rows:
        warps = int(row["threads"]) // 32
        assert 65536 // (int(row["registers"]) * int(row["threads"])) * warps >= least, row
        assert 100 * 1024 // max(int(row["shared_bytes"]), 1) * warps >= least, row
