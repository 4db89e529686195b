"""The pre-training script as its users run it."""

import json
from functools import partial

import pretrain as pretrain_script
import pytest
import safetensors.torch
import torch
import yaml
from conftest import tiny_model
from scripts import EXAMPLES, TINY_PRETRAIN, metrics, refused, run_here, run_script, succeeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adamae_sampler.models import load_checkpoint
from training.checkpoints import Checkpoints

pretrain = partial(run_script, "pretrain.py")
pretrain_here = partial(run_here, pretrain_script.main)


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    printed = pretrain_here(*TINY_PRETRAIN, "--preset", "bigbuckbunny", "--steps", 3, "--output", folder)
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
    assert all(line["tflops"] > 0 and line["memory_gib"] > 0.05 for line in lines)
    summary = (folder / "summary.txt").read_text()
    assert summary.startswith("3 steps, 12.0 epochs\n")
    assert (
        f"reconstruction: {lines[0]['reconstruction']:.4g} at step 1, {lines[2]['reconstruction']:.4g} at the end"
        in summary
    )
    assert "skipped steps: 0" in summary
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["base_lr"] == 0.032


def test_weights_of_a_run_load(run_of_three):
    model = tiny_model()
    report = load_checkpoint(model, run_of_three[0] / "model.safetensors")
    assert report.missing == report.unused == ()
    state = safetensors.torch.load_file(run_of_three[0] / "checkpoints" / "step_00000003.safetensors")
    load_checkpoint(model, run_of_three[0] / "model.safetensors")
    assert all(torch.equal(state[f"/model/{name}"], each) for name, each in model.state_dict().items())


@pytest.mark.parametrize("masking", ["random", "tube", "frame", "block", "grid", "motion"])
def test_fixed_maskings_run_by_the_same_recipe(masking, tmp_path):
    pretrain_here(*TINY_PRETRAIN, "--steps", 2, "--data", "sprites", "--masking", masking, "--output", tmp_path)
    for line in metrics(tmp_path):
        assert line["sampling"] is line["entropy"] is None
        assert line["loss"] == line["reconstruction"]


def test_the_ramp_of_hard_masking_lasts_the_whole_run(tmp_path):
    """Also in a run that goes on, and with several batches a step."""
    common = [*TINY_PRETRAIN, "--data", "sprites", "--masking", "hard", "--score-network", "pooled", "--save-every", 2]
    pretrain_here(*common, "--steps", 4, "--effective-batch", 8, "--output", tmp_path)
    for line in metrics(tmp_path):
        assert line["entropy"] is None
        assert line["nonfinite_scores"] == 0
        assert line["loss"] == pytest.approx(line["reconstruction"] + 1e-4 * line["sampling"], rel=1e-4)
        assert line["sampling"] > 0
    for file, done in ("checkpoints/step_00000002.safetensors", 4), ("model.safetensors", 8):
        state = safetensors.torch.load_file(tmp_path / file)
        ramp = {name.rpartition(".")[2]: int(each) for name, each in state.items() if "sampler.share." in name}
        assert ramp == {"step": done, "num_steps": 8}
    last = metrics(tmp_path)[-2:]
    Checkpoints(tmp_path / "checkpoints").begin(2)
    pretrain_here("--resume", "auto", "--output", tmp_path)
    assert [line["sampling"] for line in metrics(tmp_path)[-2:]] == [line["sampling"] for line in last]
    again = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(each, again[name]) for name, each in state.items())


def test_a_trace_of_three_steps(tmp_path):
    pretrain_here(*TINY_PRETRAIN, "--data", "sprites", "--steps", 7, "--profile", "--output", tmp_path)
    (trace,) = (tmp_path / "profile").glob("*.pt.trace.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 3


def test_presets_can_be_looked_at_without_data():
    printed = pretrain_here("--preset", "ssv2", "--dry-run")
    assert "settings  preset ssv2" in printed
    assert "800 epochs, 40 of warm-up; steps follow from the data" in printed
    assert "learning rate  0.00015 x 2048 / 256 = 0.0012" in printed


@pytest.mark.slow
def test_nothing_but_broken_videos_ends_with_a_clear_line(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    run = pretrain(*TINY_PRETRAIN, "--steps", 2, "--data", tmp_path, "--output", tmp_path / "out", "--workers", 1)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-2].startswith("error: 20 videos in a row could not be read")
    assert "broken.mp4: it cannot be opened as a video" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    for _ in range(2):
        printed = pretrain_here(*TINY_PRETRAIN, "--data", "sprites", "--steps", 2, "--output", tmp_path / "run")
    assert f"the earlier run is now {tmp_path / 'run-1'}" in printed
    for name in ("run", "run-1"):
        assert [line["step"] for line in metrics(tmp_path / name)] == [1, 2]
        assert (tmp_path / name / "checkpoints" / "step_00000002.safetensors").exists()


def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path):
    printed = pretrain_here("--preset", "k400", "--data", EXAMPLES / "clips", "--dry-run", "--output", tmp_path / "x")
    assert "learning rate  0.00015 x 2048 / 256 = 0.0012" in printed
    assert "adaptive, 95.0% of 1568 tokens masked" in printed
    assert "flip" in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "no preset 'nope'; there are bigbuckbunny, demo"),
        (["--data", "/nowhere"], "no such folder or list file"),
        (["--mask-ratio", "1.2"], "strictly between 0 and 1"),
        (["--num-frames", "7"], "tubelet_size=2 does not divide"),
        (["--effective-batch", "7"], "not a multiple of batch_size x devices"),
        (["--resume", "/nowhere/step_00000001.safetensors"], "no such file"),
        (["--masking", "blocks"], "blocks"),
        (["--model", "vit_tiny_patch16_224"], "pretrain_adamae_vit_base_patch16_224"),
        (["--clip-grad", "-1"], "clip_grad=-1.0, expected 0 or more"),
        (["--epochs", "3"], "epochs has no effect while steps is 800; add --steps None"),
        (["--preset", "k400"], "preset k400 needs --data"),
        (["--stride", "0"], "stride=0, expected 1 or more"),
        (["--embed-dim", "36", "--num-heads", "6"], "the score network's 8 heads do not divide its width 36"),
        (["--sttride", "2"], "sttride"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(arguments, message, tmp_path):
    assert message in refused(pretrain_script.main, *arguments, "--output", tmp_path)


@pytest.mark.slow
def test_metrics_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    common = [*TINY_PRETRAIN, "--tracker", "wandb", "--picture-every", 2, "--output", tmp_path / "run"]
    succeeded(pretrain(*common, "--steps", 2))
    [_] = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/overview_2_*.png")
    name = (tmp_path / "run" / "tracker.txt").read_text().strip()
    [written] = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    for line in metrics(tmp_path / "run"):
        assert json.dumps(line["reconstruction"]).encode() in written.read_bytes()


@pytest.mark.slow
def test_metrics_go_to_trackio_too_and_a_resumed_run_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it on import
    pytest.importorskip("trackio")
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    common = [*TINY_PRETRAIN, "--tracker", "trackio", "--picture-every", 3, "--output", tmp_path / "run"]
    succeeded(pretrain(*common, "--steps", 2))
    succeeded(pretrain(*common, "--steps", 3, "--resume", "auto"))
    name = (tmp_path / "run" / "tracker.txt").read_text().strip()
    [run] = Api().runs("adamae_sampler")
    assert run.name == name
    logged = SQLiteStorage.get_logs("adamae_sampler", name)
    assert [line["step"] for line in logged if "reconstruction" in line] == [1, 2, 3]
    assert [line["step"] for line in logged if "overview" in line] == [3]
    assert [run.config[key] for key in ("masking", "mask_ratio")] == ["adaptive", 0.75]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"--tracker wandb is not installed; pip install wandb"):
        pretrain_script.main([*map(str, TINY_PRETRAIN), "--tracker", "wandb", "--output", str(tmp_path)])
