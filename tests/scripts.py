"""Running the example scripts as their users do."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
# The sizes of conftest.tiny_model, for files that do not state them.
ENCODER = "--img-size 32 32 --num-frames 8 --patch-size 8 --embed-dim 32 --depth 2 --num-heads 2".split()  # noqa: SIM905
DECODER = "--decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2".split()  # noqa: SIM905
TINY_PRETRAIN = [*ENCODER, *DECODER]
TINY_PRETRAIN += "--mask-ratio 0.75 --batch-size 4 --warmup-steps 1 --workers 0 --log-every 1".split()  # noqa: SIM905


def run_script(name, *arguments, launcher=()):
    return subprocess.run(_command(name, launcher, arguments), capture_output=True, text=True, timeout=300, check=False)


def start_script(name, *arguments, launcher=()):
    pipe = subprocess.PIPE
    return subprocess.Popen(_command(name, launcher, arguments), stdout=pipe, stderr=pipe, text=True)


def _command(name, launcher, arguments):
    return [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]


def succeeded(run):
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def two_processes(port):
    return ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_checkpoint(folder):
    return max((folder / "checkpoints").glob("step_*.safetensors"))
