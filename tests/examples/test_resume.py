"""Checkpoints: their contents, when they are written, and runs that resume from them as if never interrupted."""

import itertools
import json
import os
import random
import signal
import time
from functools import partial

import linear_probe
import pretrain as pretrain_script
import pytest
import safetensors.torch
import torch
import yaml
from conftest import needs_posix
from forked import Started, run_group
from scripts import (
    EXAMPLES,
    TINY_PRETRAIN,
    TWO_PROCESSES,
    children,
    metrics,
    metrics_so_far,
    newest_checkpoint,
    refused,
    run_here,
    run_script,
    start_script,
    succeeded,
    wait_for_step,
)
from videos import write_video

from training.checkpoints import BEST, Checkpoints, _put_tensors, _take_tensors
from training.pretrain_recipe import PretrainRecipe
from training.resume import recipe_of_state

pretrain = partial(run_script, "pretrain.py")
pretrain_here = partial(run_here, pretrain_script.main)
SPRITES = [*TINY_PRETRAIN, "--data", "sprites:64"]
EXACT = ("loss", "reconstruction", "sampling", "entropy", "grad_norm", "coverage", "lr")


def same_numbers(one, two):
    one, two = metrics(one), metrics(two)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in EXACT:
        assert [line[name] for line in one] == [line[name] for line in two], name


def same_weights(one, two):
    one, two = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def run_until(folder, steps, *arguments):
    """Starts a run that exits without any cleanup right after the metrics of step `steps` are written."""
    script = f"""
import os, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import pretrain, training.run_log as m
real = m.RunLog.write
def write(self, step, values):
    real(self, step, values)
    if step == {steps}: os._exit(3)
m.RunLog.write = write
pretrain.main({[str(each) for each in [*arguments, "--output", folder]]!r})
"""
    (folder.parent / "script.py").write_text(script)
    assert run_group(1, folder.parent / "script.py").returncode == 3


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Bit for bit: weights, order of data, augmentation, masks, dropout, optimiser, learning rate, and the running means
    of the metrics, since the checkpoint lies between two logged steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*TINY_PRETRAIN, "--log-every", 3, "--save-every", 2, "--steps", 6]
    pretrain_here(*common, "--output", whole)
    run_until(parts, 3, *common)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill may leave it
    printed = succeeded(pretrain("--resume", newest_checkpoint(parts)))  # settings and folder come from the checkpoint
    assert "from step 2" in printed
    assert f"settings  those of {parts}" in printed
    same_numbers(whole, parts)
    same_weights(whole, parts)


def test_resuming_with_another_recipe_or_data_is_refused(tmp_path):
    pretrain_here(*SPRITES, "--steps", 2, "--output", tmp_path / "run")
    checkpoint = newest_checkpoint(tmp_path / "run")
    for change, message in (
        (["--base-lr", 1], "base_lr: 0.064 -> 1.0"),
        (["--effective-batch", 8], "effective batch: 4 -> 8"),
        (["--steps", 1], "is at step 2, this run ends at 1"),
        (["--data", "sprites:32"], "number of videos: 64 -> 32"),
        (["--data", "sprites:64:1"], "videos: the same number, but other names or another order"),
    ):
        assert message in refused(pretrain_script.main, "--resume", checkpoint, *change)
    # A resumed run in the folder of another run sets the other aside. A setting that only saves memory may change.
    pretrain_here(*SPRITES, "--steps", 1, "--output", tmp_path / "other")
    arguments = ["--steps", 3, "--no-fused-head", "--output", tmp_path / "other"]
    printed = pretrain_here("--resume", checkpoint, *arguments)
    assert f"the earlier run is now {tmp_path / 'other-1'}" in printed
    assert [line["step"] for line in metrics(tmp_path / "other")] == [3]


def test_data_that_moved_is_the_same_data(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in ("a.mp4", "b.mp4"):
            write_video(tmp_path / place / name)
    arguments = [*TINY_PRETRAIN, "--stride", 1, "--output", tmp_path / "run", "--resume", "auto"]
    pretrain_here(*arguments, "--data", tmp_path / "here", "--steps", 1)
    assert "from step 1" in pretrain_here(*arguments, "--data", tmp_path / "there", "--steps", 2)
    (tmp_path / "there" / "b.mp4").rename(tmp_path / "there" / "c.mp4")
    said = refused(pretrain_script.main, *arguments, "--data", tmp_path / "there", "--steps", 3)
    assert "videos: the same number, but other names or another order" in said


def test_resume_auto_starts_resumes_and_skips_damaged_checkpoints(tmp_path):
    common = [*SPRITES, "--save-every", 1, "--keep-checkpoints", 9, "--output", tmp_path / "run", "--resume", "auto"]
    assert "a new run begins" in pretrain_here(*common, "--steps", 3)
    folder = tmp_path / "run" / "checkpoints"
    truncated = folder / "step_00000003.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "step_00000004.safetensors")
    torch.save({"step": 5}, folder / "step_00000005.safetensors")
    foreign = json.loads(safetensors.safe_open(folder / "step_00000002.safetensors", "pt").metadata()["state"])
    safetensors.torch.save_file(
        {"a": torch.zeros(1)}, folder / "step_00000006.safetensors", {"state": json.dumps({**foreign, "kind": "x"})}
    )
    printed = pretrain_here(*common, "--steps", 4)
    assert "step_00000003.safetensors is truncated or not a checkpoint" in printed
    assert "step_00000004.safetensors is not a training state of these scripts" in printed
    assert "step_00000005.safetensors is truncated or not a checkpoint" in printed
    assert "step_00000006.safetensors is a state of x.py; pretrain.py cannot resume it" in printed
    assert "step_00000002.safetensors from step 2" in printed
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run-1").exists()


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in enumerate([-3.0, -1.0, -2.0, None], start=1):
        state = {"format": "adamae_sampler training state 4", "kind": "pretrain", "step": step, "score": score}
        checkpoints.save({**state, "model": {"w": torch.full((3,), step)}})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors", "step_00000003.safetensors", "step_00000004.safetensors"
    ]  # fmt: skip
    assert safetensors.torch.load_file(tmp_path / BEST)["/model/w"].tolist() == [2, 2, 2]


def test_resuming_from_an_earlier_step_sets_later_checkpoints_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = {"format": "adamae_sampler training state 4", "kind": "pretrain", "score": None}
    for step in (10, 20, 30):
        Checkpoints(tmp_path, keep=9).save({**state, "step": step})
    (tmp_path / ".step_00000031.safetensors.partial").write_bytes(b"half")
    checkpoints.begin(20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000010.safetensors", "step_00000020.safetensors", "step_00000030.set_aside"
    ]  # fmt: skip
    (tmp_path / "step_00000020.safetensors").write_bytes(b"damaged")
    saved = checkpoints.save({**state, "step": 21})
    assert checkpoints.newest("pretrain") == (saved, [])
    saved.write_bytes(b"damaged")
    assert checkpoints.newest("pretrain")[0] is None


def test_the_best_stands_in_where_the_latest_are_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoints.save({"format": "adamae_sampler training state 4", "kind": "x", "score": 1.0, "step": 1})
    saved.unlink()
    assert checkpoints.newest("x") == (tmp_path / BEST, [])


def test_trees_of_tensors_come_back():
    tree = {"a": [torch.arange(3), 1, None, "x"], "b": {"c": torch.tensor(2.5), "d": [0.1, float("inf"), True]}}
    tensors = {}
    marked = json.loads(json.dumps(_take_tensors(tree, "", tensors)))
    assert set(tensors) == {"/a/0", "/b/c"}
    back = _put_tensors(marked, tensors)
    assert torch.equal(back["a"][0], torch.arange(3))
    assert back["b"]["c"] == 2.5
    assert (back["a"][1:], back["b"]["d"]) == ([1, None, "x"], [0.1, float("inf"), True])
    with pytest.raises(TypeError, match=r"/a is a set, expected tensors"):
        _take_tensors({"a": {1}}, "", {})


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch pickle_was_loaded",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), tmp_path / "step_00000001.safetensors")
    (tmp_path / "weights.pth").write_bytes((tmp_path / "step_00000001.safetensors").read_bytes())
    for name in ("step_00000001.safetensors", "weights.pth"):
        for script, arguments in (
            (pretrain_script, ["--resume", name]),
            (linear_probe, ["--checkpoint", name, "--train", "sprites:4:1", "--val", "sprites:4:2"]),
        ):
            with pytest.raises(SystemExit, match="error: "):
                script.main(arguments)
    assert not (tmp_path / "pickle_was_loaded").exists()


# ---- runs that are killed, signalled or short of disk ----


# With this slow disk, a checkpoint is being written about half of the time.
SLOW_DISK = f"""
import os, sys, time
sys.path.insert(0, {str(EXAMPLES)!r})
import pretrain
fsync = os.fsync
def slow(file):
    time.sleep(0.02)
    fsync(file)
os.fsync = slow
pretrain.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_run_loses_nothing(tmp_path):
    """ADAMAE_SAMPLER_KILLS sets the number of kills, 3 by default."""
    kills = int(os.environ.get("ADAMAE_SAMPLER_KILLS", "3"))
    (tmp_path / "script.py").write_text(SLOW_DISK)
    common = [*SPRITES, "--save-every", 1, "--steps", 25 * kills]
    pretrain_here(*common, "--output", tmp_path / "whole")
    parts, moments = tmp_path / "parts", random.Random(0)
    reached, while_writing = 0, 0
    for _ in range(kills):
        process = Started(tmp_path / "script.py", *common, "--output", parts, "--resume", "auto")
        wait_for_step(parts, reached + 1, process)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.communicate()
        while_writing += any((parts / "checkpoints").glob(".*.partial"))
        reached = metrics_so_far(parts)
        assert reached < 25 * kills, "it ended before it was killed"
        for path in (parts / "checkpoints").glob("*.safetensors"):
            assert safetensors.torch.load_file(path)
    pretrain_here(*common, "--output", parts, "--resume", "auto")
    print(f"{kills} kills, {while_writing} of them while a checkpoint was written")
    assert while_writing or kills < 20
    same_numbers(tmp_path / "whole", parts)
    same_weights(tmp_path / "whole", parts)


@pytest.mark.slow
@needs_posix
def test_killed_in_the_middle_of_writing(tmp_path):
    common = [*SPRITES, "--save-every", 2, "--steps", 6]
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import pretrain, safetensors.torch, common.atomic_files
real, calls = safetensors.torch.save_file, []
def save_file(tensors, path, metadata):
    real(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = save_file
pretrain.main({[*map(str, common), "--output", str(tmp_path / "parts")]!r})
"""
    (tmp_path / "script.py").write_text(script)
    assert run_group(1, tmp_path / "script.py").returncode == -9
    pretrain_here(*common, "--output", tmp_path / "whole")
    printed = pretrain_here(*common, "--output", tmp_path / "parts", "--resume", "auto")
    assert "step_00000002.safetensors from step 2" in printed
    same_numbers(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["one process", "two"])
@pytest.mark.slow
@needs_posix
def test_sigusr1_saves_and_sigterm_saves_and_stops(launcher, tmp_path):
    folder = tmp_path / "run"
    arguments = [*SPRITES, "--steps", 100_000, "--effective-batch", 8, "--save-every", 100_000, "--workers", 2]
    process = start_script("pretrain.py", *arguments, "--output", folder, launcher=launcher)
    wait_for_step(folder, 3, process)
    everyone = children(process.pid) if launcher else [process.pid]
    for pid in everyone:
        os.kill(pid, signal.SIGUSR1)
    wait_for_step(folder, metrics_so_far(folder) + 20, process)
    first = newest_checkpoint(folder)  # it saved and went on
    for pid in [*everyone, *itertools.chain(*map(children, everyone))]:  # a scheduler signals data workers too
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if not launcher else 1), errors  # torchrun's own code is 1
    last = newest_checkpoint(folder)
    assert last > first
    step = int(last.stem.removeprefix("step_"))
    assert f"stopped after step {step} by a signal; go on with --resume {last}" in output
    assert metrics_so_far(folder) == step  # no finished step is lost
    if not launcher:
        assert f"from step {step}" in pretrain_here("--resume", last, "--steps", step + 2, "--workers", 0)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_videos(tmp_path):
    common = [*SPRITES, "--masking", "tube", "--save-every", 2]
    pretrain_here(*common, "--steps", 2, "--output", tmp_path / "run")
    arguments = ["--resume", newest_checkpoint(tmp_path / "run"), "--steps", 4, "--batch-size", 2]
    printed = succeeded(pretrain(*arguments, processes=2))
    assert "1 processes before, 2 now: steps have the same videos, but other masks and dropout" in printed
    assert "2 videos x 2 devices x 1 accumulated = 4" in printed
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
@needs_posix
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the size of written files stands in for the full disk."""
    common = [*SPRITES, "--save-every", 1, "--steps", 4, "--output", tmp_path / "run"]
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import pretrain, training.run_log as m
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = m.RunLog.write
def write(self, step, values):
    real(self, step, values)
    if step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
m.RunLog.write = write
pretrain.main({[*map(str, common)]!r})
"""
    (tmp_path / "script.py").write_text(script)
    run = run_group(1, tmp_path / "script.py")
    assert run.returncode != 0
    assert "step 2 could not be saved" in run.stdout
    assert (
        f"the newest checkpoint is {tmp_path / 'run'}/checkpoints/step_00000001.safetensors. Training goes on"
        in run.stdout
    )
    assert "error: step 4 could not be saved" in run.stderr
    assert "Traceback" not in run.stderr
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best.safetensors", "step_00000001.safetensors"]  # no half-written file
    assert "from step 1" in pretrain_here(*common, "--resume", "auto")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_recipe_of_an_earlier_version_is_understood(tmp_path):
    pretrain_here(*SPRITES, "--steps", 1, "--output", tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run")
    with safetensors.safe_open(path, "pt") as file:
        tree = json.loads(file.metadata()["state"])
    for then, now in ((True, "whole"), (False, None)):
        tree["recipe"] |= {"head_chunks": 8, "compile": then}
        for later in ("graph", "fast"):
            tree["recipe"].pop(later, None)
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"state": json.dumps(tree)})
        recipe = recipe_of_state(PretrainRecipe, path)
        assert (recipe.compile, recipe.graph, recipe.fast) == (now, False, False)
    printed = pretrain_here("--resume", path, "--steps", 2)
    assert "from step 1" in printed


def test_a_resumed_run_keeps_fast(tmp_path):
    run = tmp_path / "run"
    pretrain_here(*SPRITES, "--fast", "--steps", 1, "--output", run)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["fast"] is True
    recipe = recipe_of_state(PretrainRecipe, newest_checkpoint(run))
    assert (recipe.fast, recipe.score_network, recipe.sample_from, recipe.decode_ratio) == (
        True,
        "pooled",
        "pixels",
        0.5,
    )
    contradicted = refused(pretrain_script.main, "--resume", newest_checkpoint(run), "--score-network", "mlp")
    assert "--score-network mlp contradicts --fast" in contradicted
    assert "from step 1" in pretrain_here("--resume", newest_checkpoint(run), "--steps", 2)
