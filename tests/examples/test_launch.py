"""The launch files: DDP, FSDP2 and DeepSpeed train as one process does. Sharded runs and one process share checkpoints."""

import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import finetune
import pretrain
import pytest
import safetensors.torch
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from forked import EXAMPLES, free_port, run_group
from scripts import (
    ENCODER,
    FIXED_MASKS,
    TINY_PRETRAIN,
    metrics,
    newest_checkpoint,
    refused,
    run_here,
    run_patched,
    succeeded,
    wait_for_step,
)

from common.devices import make_accelerator
from pipelines import finetuning
from training.checkpoints import Checkpoints

LAUNCH = EXAMPLES / "launch"
# Accelerate shards on GPUs only. With its distributed type set by hand, CPU processes shard over gloo.
ON_CPU = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.{}
"""
# DeepSpeed compiles its sums in shared memory on first use, and two jobs at a time would wait for each other.
BY_GLOO = """
import deepspeed.comm.torch
deepspeed.comm.torch.build_shm_op = lambda: None
"""
FIRST = {
    "one_machine": "",
    "fsdp2": ON_CPU.format("MULTI_GPU"),
    "deepspeed_zero2": BY_GLOO + ON_CPU.format("DEEPSPEED"),
}
COMMON = [
    *TINY_PRETRAIN,
    "--decode-ratio",
    1,
    "--data",
    "sprites:64",
    "--steps",
    8,
    "--save-every",
    4,
    "--effective-batch",
    8,
]


NO_GPUS = "error: the launch file is for FSDP2 or DeepSpeed, which Accelerate runs on two or more GPUs; found 0"


def launch(*arguments):
    """What `accelerate launch` hands to torchrun: (its arguments, the environment of its processes)."""
    started = []
    with mock.patch("torch.distributed.run.run", lambda args: started.append((args, dict(os.environ)))):
        launch_command(launch_command_parser().parse_args([str(each) for each in arguments]))
    [torchrun] = started
    return torchrun


def in_two(config, script, *arguments):
    """A file in two processes that have the environment which the launch file gives them."""
    torchrun, environment = launch("--config_file", LAUNCH / f"{config}.yaml", "--num_processes", 2, script)
    assert (torchrun.nproc_per_node, torchrun.training_script) == ("2", str(script))
    return run_group(2, script, *arguments, environment=environment)


def in_parts(config, folder, *arguments, patch=FIXED_MASKS):
    """Trains on two processes, with two accumulated parts a batch and recomputed activations."""
    arguments = [*COMMON, "--batch-size", 2, "--checkpoint-activations", *arguments, "--output", folder / "run"]
    return run_patched(patch, folder, *arguments, start=lambda script: in_two(config, script), first=FIRST[config])


def assert_same(one, two, steps=4, tolerance=1e-5):
    one, two = one / "run", two / "run"
    for mine, theirs in zip(metrics(one)[-steps:], metrics(two)[-steps:], strict=True):
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
    """The folder of the same training on one process."""
    folder = tmp_path_factory.mktemp("one")
    run_patched(FIXED_MASKS, folder, *COMMON, "--batch-size", 8, "--output", folder / "run")
    return folder


@pytest.mark.parametrize("config", FIRST)
@pytest.mark.slow
def test_every_launch_file_trains_what_one_process_trains(config, one, tmp_path):
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    # It resumes from the middle of the run on one process, which tests sharded training and resuming at once.
    half = one / "run" / "checkpoints" / "step_00000004.safetensors"
    printed = in_parts(config, tmp_path / "sharded", "--resume", half, "--save-every", 2)
    assert {"one_machine": ", DDP", "fsdp2": ", FSDP2", "deepspeed_zero2": ", DeepSpeed"}[config] in printed
    assert "2 videos x 2 devices x 2 accumulated = 8" in printed
    assert_same(one, tmp_path / "sharded")
    weights = safetensors.torch.load_file(tmp_path / "sharded" / "run" / "model.safetensors")
    for name, weight in safetensors.torch.load_file(one / "run" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)

    if config == "one_machine":  # DDP writes the checkpoints that one process writes
        return
    later = tmp_path / "sharded" / "run" / "checkpoints" / "step_00000006.safetensors"
    arguments = ["--resume", later, "--batch-size", 8]
    run_patched(FIXED_MASKS, tmp_path / "to one", *arguments, "--output", tmp_path / "to one" / "run")
    assert_same(one, tmp_path / "to one", steps=2)


# The second pass of the seventh step gives a loss that is not finite, on one of the processes.
BAD_STEP = """
from adamae_sampler import AdaMAELoss
calls, loss = [], AdaMAELoss.forward
def bad(self, *args, **kwargs):
    out = loss(self, *args, **kwargs)
    calls.append(1)
    return out._replace(loss=out.loss * torch.nan) if torch.distributed.get_rank() == 1 and len(calls) == 14 else out
AdaMAELoss.forward = bad
"""
COUNTED = """
import atexit
atexit.register(lambda: print("compiled graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"]))
"""


@pytest.mark.slow
def test_the_ramp_of_hard_masking_goes_on_with_another_number_of_processes(tmp_path):
    """The ramp counts batches, so a resumed run with fewer batches a step counts in its own."""
    in_parts("fsdp2", tmp_path, "--masking", "hard", "--score-network", "pooled", patch="patched = forward")
    folder = tmp_path / "run"
    assert ramp_of(newest_checkpoint(folder)) == {"step": 16, "num_steps": 16}
    Checkpoints(folder / "checkpoints").begin(4)
    assert ramp_of(newest_checkpoint(folder)) == {"step": 8, "num_steps": 16}
    run_here(pretrain.main, "--resume", "auto", "--batch-size", 8, "--output", folder)
    assert ramp_of(newest_checkpoint(folder)) == ramp_of(folder / "model.safetensors") == {"step": 8, "num_steps": 8}
    assert all(line["sampling"] > 0 for line in metrics(folder))


def ramp_of(file):
    state = safetensors.torch.load_file(file)
    return {name.rpartition(".")[2]: int(each) for name, each in state.items() if "sampler.share." in name}


@pytest.mark.parametrize(("config", "compiled"), [("fsdp2", "blocks"), ("deepspeed_zero2", None)])
@pytest.mark.slow
def test_every_process_skips_a_bad_step_in_half_precision(config, compiled, one, tmp_path):
    """A step whose loss is not finite on one process changes no weight on any process."""
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    if compiled and shutil.which("c++") is None:
        pytest.skip("inductor compiles C++ on a CPU, and this machine has no c++")
    options = ["--precision", "bf16", "--save-every", 1, "--keep-checkpoints", 3]
    options += [*(["--compile", compiled] if compiled else [])]
    printed = in_parts(config, tmp_path, *options, patch=COUNTED + BAD_STEP + FIXED_MASKS)
    name = {"fsdp2": "FSDP2", "deepspeed_zero2": "DeepSpeed"}[config]
    assert f"bf16, {name}, activations recomputed{', blocks compiled' if compiled else ''}" in printed
    assert ("compiled graphs: 0" in printed) == (compiled is None)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 0, 0, 1, 0]
    for mine, theirs in zip(lines[:6], metrics(one / "run"), strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)
    ours, others = (safetensors.torch.load_file(folder / "run" / "model.safetensors") for folder in (tmp_path, one))
    assert ours.keys() == others.keys()
    before, bad, last = (
        safetensors.torch.load_file(path) for path in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    )
    names = [name for name in before if name.startswith("/model/")]
    assert all(torch.equal(before[name], bad[name]) for name in names)
    assert all(last[name].isfinite().all() for name in names)
    assert not all(torch.equal(bad[name], last[name]) for name in names)


@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
@pytest.mark.slow
def test_fine_tuning_with_shards_evaluates_on_every_process(config, tmp_path):
    """Two processes share three videos, so their numbers of batches differ."""
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    arguments = [*ENCODER, "--train", "sprites:16:1", "--val", "sprites:3:2", "--eval-batch-size", 1, "--epochs", 2]
    arguments += ["--warmup-epochs", 0, "--batch-size", 4, "--effective-batch", 8, "--eval-every", 1]
    arguments += ["--workers", 0, "--output", tmp_path / "run"]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n{FIRST[config]}\nimport finetune\n"
        f"finetune.main({[str(each) for each in arguments]!r})\n"
    )
    printed = succeeded(in_two(config, script))
    assert "of 3 videos" in printed
    assert any("val_top1" in line for line in metrics(tmp_path / "run"))
    # The written weights are the evaluated ones.
    again = ["--eval-only", "--checkpoint", tmp_path / "run" / "model.safetensors", "--val", "sprites:3:2"]
    run_here(finetune.main, *again, "--workers", 0, "--output", tmp_path / "again")
    ours, others = ((tmp_path / name / "predictions.csv").read_text() for name in ("run", "again"))
    assert ours == others


def test_a_moving_average_of_shards_is_refused(monkeypatch, tmp_path):
    make = finetuning.make_accelerator

    def sharded(*args, **kwargs):
        accelerator = make(*args, **kwargs)
        monkeypatch.setattr(type(accelerator), "distributed_type", "FSDP")
        return accelerator

    monkeypatch.setattr(finetuning, "make_accelerator", sharded)
    arguments = [*ENCODER, "--train", "sprites:16:1", "--val", "sprites:3:2", "--ema", 0.9, "--output", tmp_path]
    said = refused(finetune.main, *arguments)
    assert "--ema needs full weights on each device, and FSDP2 shards them" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_shards_without_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as the launcher does
    said = refused(pretrain.main, *COMMON, "--output", tmp_path / "run")
    assert NO_GPUS in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_launched_shards_without_gpus_are_refused(tmp_path):
    pytest.importorskip("deepspeed")
    run = in_two("deepspeed_zero2", EXAMPLES / "pretrain.py", *COMMON, "--output", tmp_path / "run")
    assert run.returncode != 0
    assert NO_GPUS in run.stderr


def test_fp16_with_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(ValueError, match="--precision fp16 does not work with DeepSpeed; use --precision bf16"):
        make_accelerator("fp16")


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for Slurm's commands. Both "machines" are this one, and SIGTERM makes srun kill its processes."""
    if os.name != "posix":
        pytest.skip("slurm.sh needs bash")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'echo "$@" >> {tmp_path}/asked\n[[ $1 != show ]] || echo localhost\n')
    (tools / "scancel").write_text(
        f'echo "scancel $@" >> {tmp_path}/asked\n'
        f'for pid in $(cat {tmp_path}/pids); do pkill -TERM -P "$pid" || true; kill -TERM "$pid" || true; done\n'
    )
    (tools / "srun").write_text(
        "while [[ $1 = --* ]]; do shift; done\n"
        'SLURM_NODEID=0 "$@" & one=$!\nSLURM_NODEID=1 "$@" & two=$!\n'
        f'echo "$one $two" > {tmp_path}/pids\n'
        'trap \'kill -KILL "$one" "$two"; exit 137\' TERM\n'
        'code=0; wait "$one" || code=$?; wait "$two" || code=$?\nexit "$code"\n'
    )
    for tool in tools.iterdir():
        tool.write_text("#!/usr/bin/env bash\n" + tool.read_text())
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "7"}
    path = f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "PORT": str(free_port())}


def submit(cluster, script, *arguments, config="many_machines"):
    command = ["bash", LAUNCH / "slurm.sh", script, *map(str, arguments)]
    cluster = {**cluster, "CONFIG": f"examples/launch/{config}.yaml"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=EXAMPLES.parent, env=cluster, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_a_slurm_job_saves_and_is_queued_again_when_its_time_is_up_and_not_when_it_is_cancelled(cluster, tmp_path):
    arguments = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 100_000, "--output", tmp_path / "run"]
    arguments += ["--save-every", 100_000]
    steps = [0]
    for number, signals in ((signal.SIGUSR1, 1), (signal.SIGTERM, 1)):
        process = submit(cluster, EXAMPLES / "pretrain.py", *arguments)
        wait_for_step(tmp_path / "run", steps[-1] + 3, process)
        if number == signal.SIGTERM:  # scancel without a signal tells the processes as well as the script
            subprocess.run([tmp_path / "bin" / "scancel"], check=True)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 1, printed + errors  # torchrun's own code
        assert "4 videos x 2 devices x 1 accumulated = 8" in printed
        assert f"from step {steps[-1]}" in printed or not steps[-1]
        steps.append(int(newest_checkpoint(tmp_path / "run").stem.removeprefix("step_")))
        assert steps[-1] > steps[-2]
        assert (tmp_path / "asked").read_text().count("requeue 7") == signals
    assert "scancel --signal=TERM 7" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("config", ["many_machines", "fsdp2", "deepspeed_zero2"])
def test_every_launch_file_starts_torchrun_on_each_of_several_machines(config):
    """DeepSpeed's own launcher would start a separate run on each machine."""
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    options = ["--config_file", LAUNCH / f"{config}.yaml", "--num_machines", 2, "--num_processes", 16]
    options += ["--machine_rank", 1, "--main_process_ip", "nodeA", "--main_process_port", 29511]
    torchrun, _ = launch(*options, "script.py", "--preset", "k400")
    assert (str(torchrun.nnodes), str(torchrun.nproc_per_node), int(torchrun.node_rank)) == ("2", "8", 1)
    assert (torchrun.rdzv_endpoint or f"{torchrun.master_addr}:{torchrun.master_port}") == "nodeA:29511"
    assert torchrun.training_script == "script.py"
