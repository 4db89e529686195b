"""The pre-training script as its users run it."""

import shutil
import subprocess
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from conftest import tiny_model
from scripts import DECODER, ENCODER, EXAMPLES, metrics, run_script, succeeded, two_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adamae_sampler.models import load_checkpoint

TINY = [*ENCODER, *DECODER]
TINY += "--mask-ratio 0.75 --batch-size 4 --warmup-steps 1 --workers 0 --log-every 1".split()  # noqa: SIM905
pretrain = partial(run_script, "pretrain.py")


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    printed = succeeded(pretrain(*TINY, "--steps", 3, "--output", folder))
    return folder, printed


def test_three_steps_on_the_bundled_video(run_of_three):
    folder, printed = run_of_three
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {
            "reconstruction",
            "sampling",
            "entropy",
            "coverage",
            "data_time",
            "step_time",
            "lr",
            "grad_norm",
        } <= set(line)
        assert line["loss"] == pytest.approx(line["reconstruction"] + 1e-4 * line["sampling"], rel=1e-4)
        assert 0 < line["entropy"] <= 4.16  # log 64
        assert 0.25 <= line["coverage"] <= 1
        assert line["skipped_steps"] == line["nonfinite_scores"] == 0
    assert "learning rate  0.032 x 4 / 256 = 0.0005" in printed
    board = EventAccumulator(str(folder))
    board.Reload()
    assert [point.step for point in board.Scalars("reconstruction")] == [1, 2, 3]
    assert (folder / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_weights_of_a_run_load(run_of_three):
    model = tiny_model()
    report = load_checkpoint(model, run_of_three[0] / "model.safetensors")
    assert report.missing == report.unused == ()
    state = torch.load(run_of_three[0] / "state.pt", weights_only=True)
    load_checkpoint(model, run_of_three[0] / "model.safetensors")
    assert all(torch.equal(state["model"][name], each) for name, each in model.state_dict().items())


def test_a_resumed_run_equals_an_uninterrupted_one(run_of_three, tmp_path):
    """Bit for bit: weights, order of data, augmentation, masks, dropout, optimiser, learning rate."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*TINY, "--save-every", "3", "--steps", "6"]
    succeeded(pretrain(*common, "--output", whole))
    # The run stops for good after its fourth step: what was saved last is the state after the third.
    interrupted = f"""
import sys; sys.argv = {["pretrain.py", *common, "--output", str(parts)]!r}
sys.path.insert(0, {str(EXAMPLES)!r})
import pretrain, common.metrics as m
real = m.RunLog.write
def write(self, step, values):
    real(self, step, values)
    if step == 4: raise SystemExit(3)
m.RunLog.write = write
recipe, run = pretrain.parse_arguments(pretrain.PretrainRecipe, sys.argv[1:], "demo", "")
pretrain.train(recipe, pretrain.build(recipe, run))
"""
    assert subprocess.run([sys.executable, "-c", interrupted], capture_output=True, check=False).returncode == 3
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill may leave it
    printed = succeeded(pretrain("--resume", parts / "state.pt"))  # its settings and its folder are the run's
    assert "from step 3" in printed
    for name in ("loss", "lr", "grad_norm", "entropy"):
        assert [line[name] for line in metrics(parts)] == [line[name] for line in metrics(whole)]
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3, 4, 5, 6]
    one, two = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for change, message in (
        (["--base-lr", 1], "base_lr: 0.032 -> 1.0"),
        (["--batch-size", 2], "effective batch: 4 -> 2"),
        (["--steps", 5], "it is at step 6, this run ends at 5"),
    ):
        refused = pretrain("--resume", parts / "state.pt", *change)
        assert refused.returncode != 0
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    # Going on in the folder of another run sets that one aside.
    printed = succeeded(pretrain("--resume", parts / "state.pt", "--steps", 7, "--output", whole))
    assert f"the earlier run is now {tmp_path / 'whole-1'}" in printed
    assert [line["step"] for line in metrics(whole)] == [7]
    assert len(metrics(tmp_path / "whole-1")) == 6


@pytest.mark.parametrize("masking", ["random", "tube", "frame"])
def test_fixed_maskings_run_by_the_same_recipe(masking, tmp_path):
    succeeded(pretrain(*TINY, "--steps", 2, "--data", "sprites", "--masking", masking, "--output", tmp_path))
    for line in metrics(tmp_path):
        assert line["sampling"] is line["entropy"] is None
        assert line["loss"] == line["reconstruction"]


def test_accumulated_gradients_are_those_of_a_large_batch(tmp_path):
    """Up to the masks, which are drawn per forward pass: a sum in place of the mean would be four times as large."""
    fixed = [*TINY, "--data", "sprites", "--steps", 2]
    for name, batch in (("whole", 8), ("parts", 2)):
        succeeded(pretrain(*fixed, "--batch-size", batch, "--effective-batch", 8, "--output", tmp_path / name))
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [line["lr"] for line in whole] == [line["lr"] for line in parts]
    for name in ("reconstruction", "grad_norm"):
        assert whole[0][name] == pytest.approx(parts[0][name], rel=0.3)


def test_broken_videos_are_left_out_and_listed_at_the_end(tmp_path):
    shutil.copy(EXAMPLES / "clips" / "bigbuckbunny.mp4", tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 1000)
    (tmp_path / "list.csv").write_text("good.mp4 0\nmissing.mp4 1\nbroken.mp4 2\n")
    run = pretrain(*TINY, "--steps", 4, "--data", tmp_path / "list.csv", "--output", tmp_path / "out", "--workers", 2)
    printed = succeeded(run)
    assert len(metrics(tmp_path / "out")) == 4
    assert "2 videos could not be read" in printed
    listed = (tmp_path / "out" / "left_out.txt").read_text()
    assert "list.csv:2 (missing.mp4): there is no such file" in listed
    assert "list.csv:3 (broken.mp4): it cannot be opened as a video" in listed


def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch, pretrain
from adamae_sampler import AdaMAELoss
calls, weights = [], []
real = AdaMAELoss.forward
def forward(self, prediction, video, sample):
    out = real(self, prediction, video, sample)
    calls.append(1)
    return out._replace(loss=out.loss * torch.nan) if len(calls) == 2 else out
AdaMAELoss.forward = forward
zero_grad = torch.optim.AdamW.zero_grad
def record(self, *args, **kwargs):
    weights.append([p.detach().clone() for g in self.param_groups for p in g["params"]])
    zero_grad(self, *args, **kwargs)
torch.optim.AdamW.zero_grad = record
recipe, run = pretrain.parse_arguments(pretrain.PretrainRecipe, {[*TINY, "--steps", "3", "--data", "sprites", "--output", str(tmp_path)]!r}, "demo", "")
pretrain.train(recipe, pretrain.build(recipe, run))
same = [all(torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(weights, weights[1:])]
assert same == [True, False], same
assert all(p.isfinite().all() for p in weights[-1])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    printed = succeeded(run)
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [0, 1, 0]
    assert [line["loss"] is None for line in metrics(tmp_path)] == [False, True, False]
    assert "step 2: " in printed
    assert "skipped_steps 1" in printed


def test_presets_can_be_looked_at_without_data():
    printed = succeeded(pretrain("--preset", "ssv2", "--dry-run"))
    assert "800 epochs, 40 of warm-up; steps follow from the data" in printed
    assert "learning rate  0.00015 x 2048 / 256 = 0.0012" in printed


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_videos_ends_with_a_clear_line(workers, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    run = pretrain(*TINY, "--steps", 2, "--data", tmp_path, "--output", tmp_path / "out", "--workers", workers)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-2].startswith("error: 20 videos in a row could not be read")
    assert "broken.mp4: it cannot be opened as a video" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    for _ in range(2):
        printed = succeeded(pretrain(*TINY, "--data", "sprites", "--steps", 2, "--output", tmp_path / "run"))
    assert f"the earlier run is now {tmp_path / 'run-1'}" in printed
    for name in ("run", "run-1"):
        assert [line["step"] for line in metrics(tmp_path / name)] == [1, 2]
        assert (tmp_path / name / "state.pt").exists()


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path):
    printed = succeeded(
        pretrain("--preset", "k400", "--data", EXAMPLES / "clips", "--dry-run", "--output", tmp_path / "x")
    )
    assert "learning rate  0.00015 x 2048 / 256 = 0.0012" in printed
    assert "adaptive, 78 of 1568 tokens visible (95.0% masked)" in printed
    assert "flip" in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "no preset 'nope'; there are demo"),
        (["--data", "/nowhere"], "no such folder or list file"),
        (["--mask-ratio", "1.2"], "strictly between 0 and 1"),
        (["--num-frames", "7"], "tubelet_size=2 does not divide"),
        (["--effective-batch", "7"], "not a multiple of batch_size x devices"),
        (["--resume", "/nowhere/state.pt"], "no such file"),
        (["--masking", "block"], "block"),
        (["--model", "vit_tiny_patch16_224"], "no model 'vit_tiny_patch16_224'; there are pretrain_adamae_vit_base"),
        (["--clip-grad", "-1"], "clip_grad=-1.0, expected 0 or more"),
        (["--epochs", "3"], "epochs has no effect while steps is 400; add --steps None"),
        (["--preset", "k400"], "preset k400 needs --data"),
        (["--stride", "0"], "stride=0, expected 1 or more"),
        (["--embed-dim", "36", "--num-heads", "6"], "the score network's 8 heads do not divide its width 36"),
        (["--sttride", "2"], "sttride"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(arguments, message, tmp_path):
    run = pretrain(*arguments, "--output", tmp_path)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_two_processes(tmp_path):
    """DDP without find_unused_parameters: it would raise if a sampler parameter got no gradient."""
    arguments = [
        *TINY,
        "--data",
        "sprites",
        "--steps",
        3,
        "--batch-size",
        2,
        "--effective-batch",
        8,
        "--output",
        tmp_path,
    ]
    printed = succeeded(pretrain(*arguments, launcher=two_processes(29517)))
    assert "2 videos x 2 devices x 2 accumulated = 8" in printed
    assert len(metrics(tmp_path)) == 3
