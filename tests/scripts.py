"""Running the example scripts as their users do."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
# The sizes of conftest.tiny_model, for files that do not state them.
ENCODER = "--img-size 32 32 --num-frames 8 --patch-size 8 --embed-dim 32 --depth 2 --num-heads 2".split()  # noqa: SIM905
DECODER = "--decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2".split()  # noqa: SIM905


def run_script(name, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def succeeded(run):
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def two_processes(port):
    return ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
