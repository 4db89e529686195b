"""Running the example scripts as their users do."""

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pretrain
import psutil
import pytest
import torch
from forked import EXAMPLES, Started, run_group

from adamae_sampler.models import AdaMAE

# The sizes of conftest.tiny_model, for files that do not state them.
ENCODER = "--img-size 32 32 --num-frames 8 --patch-size 8 --embed-dim 32 --depth 2 --num-heads 2".split()  # noqa: SIM905
DECODER = "--decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2".split()  # noqa: SIM905
TINY_PRETRAIN = [*ENCODER, *DECODER]
TINY_PRETRAIN += "--mask-ratio 0.75 --batch-size 4 --warmup-steps 1 --workers 0 --log-every 1".split()  # noqa: SIM905


def run_script(name, *arguments, processes=1):
    """What a script comes to in processes of its own."""
    return run_group(processes, EXAMPLES / name, *arguments)


def refused(main, *arguments):
    """The output of a script that refuses its arguments. It runs in this process, since a new one takes seconds to start."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out), pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    assert ended.value.code not in (0, None)
    return f"{ended.value.code}\n{out.getvalue()}"


def run_here(main, *arguments):
    """The output of a script that succeeds. It runs in this process, for tests of results and not of the start."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        main([str(each) for each in arguments])
    return out.getvalue()


def start_script(name, *arguments, launcher=()):
    """A script in a process of its own, or with a launcher started as its users start it."""
    if not launcher:
        return Started(EXAMPLES / name, *arguments)
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def succeeded(run):
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# The mask depends on the clip alone and dropout is off, so nothing is drawn.
FIXED_MASKS = """
from adamae_sampler.ops import patchify
def patched(self, video, **kwargs):
    for module in self.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    darkness = patchify(video.float(), patch_size=8, tubelet_size=2).mean(2)
    mask = torch.ones_like(darkness, dtype=torch.bool).scatter(1, darkness.topk(self.sampler.num_visible).indices, False)
    return forward(self, video, mask=mask)
"""


def run_patched(patch, folder, *arguments, start=None, first=""):
    """pretrain.py with a patch of AdaMAE.forward, in this process or in others.

    Args:
        patch: code that defines `patched`, with `forward` and torch at hand.
        folder: of the file that other processes run.
        arguments: of pretrain.py.
        start: runs that file to its end; None for this process.
        first: code of the file before it imports the package.
    """
    folder.mkdir(exist_ok=True)
    if start is None:
        names = {"torch": torch, "forward": AdaMAE.forward}
        exec(patch, names)
        with mock.patch.object(AdaMAE, "forward", names["patched"]):
            return run_here(pretrain.main, *arguments)
    script = folder / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{first}\nimport torch, pretrain\n"
        f"from adamae_sampler.models import AdaMAE\nforward = AdaMAE.forward\n{patch}\nAdaMAE.forward = patched\n"
        f"pretrain.main({[str(each) for each in arguments]!r})\n"
    )
    return succeeded(start(script))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest_checkpoint(folder):
    return max((folder / "checkpoints").glob("step_*.safetensors"))


def wait_for_step(folder, step, process, timeout=120):
    """Waits until the metrics of a step have been written."""
    path, until = folder / "metrics.jsonl", time.monotonic() + timeout
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        lines = path.read_text().splitlines() if path.exists() else []
        if any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines):
            return
        time.sleep(0.01)
    raise TimeoutError(f"step {step} was not reached in {timeout} s")


def metrics_so_far(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line)["step"] for line in lines if line.endswith("}"))


def children(pid):
    """The processes that a process has started, the oldest first."""
    return [child.pid for child in sorted(psutil.Process(pid).children(), key=psutil.Process.create_time)]
