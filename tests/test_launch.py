"""The launch files: DDP, FSDP2 and DeepSpeed train what one process trains, and go on with each other's checkpoints."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from scripts import (
    ENCODER,
    EXAMPLES,
    FIXED_MASKS,
    TINY_PRETRAIN,
    metrics,
    newest_checkpoint,
    run_patched,
    run_script,
    succeeded,
)

LAUNCH = EXAMPLES / "launch"
# Accelerate shards on GPUs alone; processes that call themselves such shard over gloo.
ON_CPU = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.{}
"""
FIRST = {"one_machine": "", "fsdp2": ON_CPU.format("MULTI_GPU"), "deepspeed_zero2": ON_CPU.format("DEEPSPEED")}
COMMON = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 8, "--save-every", 4, "--effective-batch", 8]
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed and torch.compile need a C++ compiler")


def launched(config):
    options = ["--config_file", str(LAUNCH / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *options]


def in_parts(config, folder, *arguments, patch=FIXED_MASKS):
    """On two processes, each batch in two parts, with recomputed activations."""
    arguments = [*COMMON, "--batch-size", 2, "--checkpoint-activations", *arguments, "--output", folder / "run"]
    return run_patched(patch, folder, *arguments, launcher=launched(config), first=FIRST[config])


def assert_same(one, two, tolerance=1e-5):
    one, two = one / "run", two / "run"
    for mine, theirs in zip(metrics(one)[-4:], metrics(two)[-4:], strict=True):
        for name in ("step", "loss", "reconstruction", "sampling", "grad_norm", "lr"):
            assert mine[name] == pytest.approx(theirs[name], abs=tolerance), (mine["step"], name)
    ours, others = (safetensors.torch.load_file(newest_checkpoint(folder)) for folder in (one, two))
    names = {name for name in ours if name.startswith(("/model/", "/optimizer/state/"))}
    assert names == {name for name in others if name.startswith(("/model/", "/optimizer/state/"))}
    assert len(names) > 160
    for name in names:
        torch.testing.assert_close(ours[name], others[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process comes to."""
    folder = tmp_path_factory.mktemp("one")
    run_patched(FIXED_MASKS, folder, *COMMON, "--batch-size", 8, "--output", folder / "run")
    return folder


@pytest.mark.parametrize("config", FIRST)
def test_every_launch_file_trains_what_one_process_trains(config, one, tmp_path):
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    printed = in_parts(config, tmp_path / "sharded")
    assert {"one_machine": ", DDP", "fsdp2": ", FSDP2", "deepspeed_zero2": ", DeepSpeed"}[config] in printed
    assert "2 videos x 2 devices x 2 accumulated = 8" in printed
    assert_same(one, tmp_path / "sharded")
    weights = safetensors.torch.load_file(tmp_path / "sharded" / "run" / "model.safetensors")
    for name, weight in safetensors.torch.load_file(one / "run" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)

    half = "checkpoints/step_00000004.safetensors"
    in_parts(config, tmp_path / "from one", "--resume", one / "run" / half)
    assert_same(one, tmp_path / "from one")
    arguments = ["--resume", tmp_path / "sharded" / "run" / half, "--batch-size", 8]
    run_patched(FIXED_MASKS, tmp_path / "to one", *arguments, "--output", tmp_path / "to one" / "run")
    assert_same(one, tmp_path / "to one")


# The second pass of the second step gives a loss that is not finite, on one of the processes.
BAD_STEP = (
    FIXED_MASKS.replace("def patched", "def fixed")
    + """
calls = []
def patched(self, video, **kwargs):
    prediction, sample = fixed(self, video, **kwargs)
    calls.append(1)
    bad = torch.distributed.get_rank() == 1 and len(calls) == 4
    return prediction * (torch.nan if bad else 1), sample
"""
)


@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
def test_a_bad_step_of_one_process_is_skipped_by_all(config, tmp_path):
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    in_parts(config, tmp_path, "--steps", 3, "--save-every", 1, "--keep-checkpoints", 3, patch=BAD_STEP)
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 1, 0]
    first, bad, last = (
        safetensors.torch.load_file(path) for path in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    )
    names = [name for name in first if name.startswith("/model/")]
    assert all(torch.equal(first[name], bad[name]) for name in names)
    assert all(last[name].isfinite().all() for name in names)
    assert not all(torch.equal(bad[name], last[name]) for name in names)


def test_compiled_in_half_precision_with_parts_and_recomputed_activations(one, tmp_path):
    printed = in_parts("fsdp2", tmp_path, "--compile", "--precision", "bf16")
    assert "bf16, FSDP2, activations recomputed, compiled" in printed
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(one / "run"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    ours, others = (safetensors.torch.load_file(folder / "run" / "model.safetensors") for folder in (tmp_path, one))
    assert ours.keys() == others.keys()


def test_fine_tuning_with_shards_evaluates_on_every_process(tmp_path):
    """Three videos for two processes, which so have different numbers of batches."""
    arguments = [*ENCODER, "--train", "sprites:16:1", "--val", "sprites:3:2", "--eval-batch-size", 1, "--epochs", 2]
    arguments += ["--warmup-epochs", 0, "--batch-size", 4, "--effective-batch", 8, "--eval-every", 1]
    arguments += ["--workers", 0, "--output", tmp_path / "run"]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{FIRST['fsdp2']}\nimport finetune\n"
        "finetune.main(sys.argv[1:])\n"
    )
    command = [sys.executable, *launched("fsdp2"), str(script), *map(str, arguments)]
    printed = succeeded(subprocess.run(command, capture_output=True, text=True, check=False))
    assert "of 3 videos" in printed
    assert any("val_top1" in line for line in metrics(tmp_path / "run"))
    # The weights that were written are those that were evaluated.
    again = ["--eval-only", "--checkpoint", tmp_path / "run" / "model.safetensors", "--val", "sprites:3:2"]
    succeeded(run_script("finetune.py", *again, "--workers", 0, "--output", tmp_path / "again"))
    ours, others = ((tmp_path / name / "predictions.csv").read_text() for name in ("run", "again"))
    assert ours == others
    refused = subprocess.run([*command, "--ema", "0.9"], capture_output=True, text=True, check=False)
    assert "--ema needs the whole weights on each device, which FSDP2 shards" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
def test_shards_without_gpus_are_refused(config, tmp_path):
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    run = run_script("pretrain.py", *COMMON, "--output", tmp_path / "run", launcher=launched(config))
    assert run.returncode != 0
    assert "error: the launcher asks for FSDP2 or DeepSpeed, which Accelerate has for several GPUs alone" in run.stderr


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for Slurm's commands: two "machines" that are this one."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n[ "$1" = show ] && echo localhost\nexit 0\n'
    )
    (tools / "srun").write_text(
        "#!/bin/bash\nshift  # its option\n"
        'SLURM_NODEID=0 "$@" & one=$!\nSLURM_NODEID=1 "$@" & two=$!\n'
        'trap \'kill -TERM "$one" "$two"\' TERM\n'
        'code=0; wait "$one" || code=$?; wait "$one" || code=$?; wait "$two" || code=$?\nexit "$code"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7"}
    path = f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "PORT": "29677"}


def test_the_slurm_script_trains_on_two_machines_and_is_queued_again(cluster, tmp_path):
    arguments = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 100_000, "--output", tmp_path / "run"]
    command = ["bash", LAUNCH / "slurm.sh", EXAMPLES / "pretrain.py", *map(str, arguments)]

    def start():
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=EXAMPLES.parent, env=cluster, stdout=pipe, stderr=pipe, text=True)

    steps = []
    for _ in range(2):
        process = start()
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (tmp_path / "run" / "metrics.jsonl").exists():
                lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
                if len(lines) > (steps[-1] + 3 if steps else 3):
                    break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, printed + errors
        assert "4 videos x 2 devices x 1 accumulated = 8" in printed
        steps.append(int(newest_checkpoint(tmp_path / "run").stem.removeprefix("step_")))
    assert f"from step {steps[0]}" in printed
    assert steps[1] > steps[0]
    assert (tmp_path / "asked").read_text().count("requeue 7") == 2
