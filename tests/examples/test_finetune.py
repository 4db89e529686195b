"""The fine-tuning script as its users run it, and its loss against hand computations."""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import finetune
import pytest
import safetensors.torch
import torch
from conftest import tiny_model
from scripts import (
    ENCODER,
    metrics,
    newest_checkpoint,
    refused,
    run_here,
    run_script,
    succeeded,
)
from test_checkpoint import renamed_as_official
from test_classifier import tiny_classifier
from torch.nn.functional import cross_entropy, log_softmax
from videos import write_video

from common.devices import Normalise, make_accelerator
from common.models import save_weights
from pipelines import finetuning
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from training.run_log import RunLog
from video_data.transforms import seed_libraries

TINY = "--batch-size 4 --warmup-steps 1 --workers 0 --log-every 1 --stride 2 --test-clips 2".split()  # noqa: SIM905
TINY += ["--effective-batch", "4"]
run_finetune = partial(run_script, "finetune.py")
finetune_here = partial(run_here, finetune.main)
# The number of parameters of the encoder: all of them have to be loaded.
PARAMETERS = sum(name.startswith("encoder.") for name in tiny_classifier().state_dict())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Lists of eight videos of three classes, with relative and absolute paths."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [write_video(folder / f"{number} ü.mp4", frames=20 + number, start=number) for number in range(8)]
    lines = [f"{path.name if number % 2 else path} {number % 3}" for number, path in enumerate(paths)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "val.csv").write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    (folder / "labels.txt").write_text("run\njump\nsit\n")
    return ["--train", folder / "train.csv", "--val", folder / "val.csv"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A weights file as pretrain.py writes it."""
    path = tmp_path_factory.mktemp("pretrained") / "model.safetensors"
    torch.manual_seed(0)
    save_weights(tiny_model(), path, PretrainRecipe())
    return path


@pytest.fixture(scope="module")
def run_of_three(data, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = [*TINY, *data, "--checkpoint", pretrained, "--steps", 3, "--eval-every", 1, "--output", folder]
    return folder, finetune_here(*arguments)


def test_a_run_from_a_pretraining_file(run_of_three, data):
    folder, printed = run_of_three
    assert f"adamae_sampler checkpoint: {PARAMETERS} tensors loaded" in printed  # the sizes come from the file
    assert "classes  3: 3 of them to train on, 3 of them to test on\n" in printed
    assert "0.0005 x 4 / 256" in printed
    lines = metrics(folder)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["nonfinite_loss"] == 0 for line in trained)
    assert [line["step"] for line in lines if "val_top1" in line] == [2]  # an epoch is two steps; the last is the test
    results = json.loads((folder / "results.json").read_text())
    assert (results["videos"], results["views"], results["left_out"]) == (3, "2 clips x 3 crops", 0)
    assert (folder / "per_class.csv").read_text().splitlines()[1].startswith("0,run,1,")
    assert len((folder / "predictions.csv").read_text().splitlines()) == 4


def test_eval_only_gives_the_predictions_of_the_run(run_of_three, data, tmp_path):
    folder, _ = run_of_three
    arguments = ["--eval-only", "--checkpoint", folder / "model.safetensors", *data[2:], "--workers", 0]
    printed = finetune_here(*arguments, "--output", tmp_path)  # stride and views come from the file
    assert f"{PARAMETERS + 4} tensors loaded" in printed  # fc_norm and head too
    assert (tmp_path / "predictions.csv").read_text() == (folder / "predictions.csv").read_text()


def test_the_encoder_of_other_formats_is_loaded_whole(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.save({"model": renamed_as_official(tiny_model().state_dict())}, tmp_path / "official.pth")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_intermediate_size=64,
    )  # fmt: skip
    transformers.VideoMAEForPreTraining(config).save_pretrained(tmp_path / "hf")
    for checkpoint, sizes, name in (("official.pth", ENCODER, "official AdaMAE"), ("hf", [], "Hugging Face VideoMAE")):
        arguments = [*TINY, *sizes, *data, "--checkpoint", tmp_path / checkpoint, "--steps", 1, "--eval-every", 0]
        printed = finetune_here(*arguments, "--output", tmp_path / name)
        assert f"{name} checkpoint: {PARAMETERS} tensors loaded" in printed
        assert "not needed, and left in the file: " in printed  # the decoder
        assert "left as they were" not in printed


@pytest.mark.parametrize(
    ("keep", "sizes", "message"),
    [("decoder.", [], "none of the formats known"), ("", ["--embed-dim", "64"], "shapes differ")],
)
def test_a_decoder_alone_and_another_size_are_refused(keep, sizes, message, data, tmp_path):
    weights = {name: each for name, each in tiny_model().state_dict().items() if name.startswith(keep)}
    torch.save(weights, tmp_path / "weights.pth")
    settings = [*TINY, *ENCODER, *sizes, *data, "--checkpoint", tmp_path / "weights.pth", "--output", tmp_path]
    assert message in refused(finetune.main, *settings)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(data, pretrained, tmp_path):
    """Bit for bit, with augmentation, erasing, mixup, drop path, a moving average and the optimiser."""
    common = [*TINY, *data, "--checkpoint", pretrained, "--ema", 0.9, "--drop-path", 0.5, "--erasing", 0.5]
    common += ["--randaugment", "rand-m7-n2-mstd0.5-inc1", "--save-every", 2, "--eval-every", 1]
    common += ["--repeats", 2]
    common += ["--steps", 4]
    finetune_here(*common, "--output", tmp_path / "whole")
    real = RunLog.write

    def write(self, step, values):
        real(self, step, values)
        if step == 3:
            raise SystemExit(3)

    with mock.patch.object(RunLog, "write", write):
        refused(finetune.main, *common, "--output", tmp_path / "parts")
    assert "from step 2" in succeeded(run_finetune("--resume", newest_checkpoint(tmp_path / "parts")))
    for name in ("loss", "lr", "grad_norm"):
        runs = [metrics(tmp_path / run) for run in ("whole", "parts")]
        values = [[line[name] for line in lines if name in line] for lines in runs]
        assert values[0] == values[1], name
    one, two = (safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes(data, pretrained, tmp_path):
    arguments = [*TINY, *data, "--checkpoint", pretrained, "--batch-size", 2, "--steps", 3, "--eval-every", 1]
    printed = succeeded(run_finetune(*arguments, "--output", tmp_path, processes=2))
    assert "2 videos x 2 devices x 1 accumulated = 4" in printed
    assert printed.count("top-1 ") == 1
    assert len([line for line in metrics(tmp_path) if "loss" in line]) == 3
    assert len([line for line in metrics(tmp_path) if "val_top1" in line]) == 1  # after the epoch of two steps


def test_bad_input_is_named_with_its_line_and_the_rest_is_done(tmp_path):
    write_video(tmp_path / "one frame.mp4", frames=1)
    write_video(tmp_path / "portrait ü.mp4", size=(48, 96), rate=30)
    write_video(tmp_path / "odd.mkv", rate=Fraction(24000, 1001))
    write_video(tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "empty.mp4").touch()
    lines = ["one frame.mp4 0", "portrait ü.mp4 1", "odd.mkv 0", f"{tmp_path / 'good.mp4'} 1", "broken.mp4 1"]
    lines += ["empty.mp4 0", "good.mp4 7", "good.mp4 -1", "missing.mp4 0"]
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = [*TINY, *ENCODER, "--train", tmp_path / "train.csv", "--val", tmp_path / "val.csv", "--num-classes", 2]
    arguments += ["--max-broken", 0.9, "--steps", 3, "--eval-every", 0]
    printed = finetune_here(*arguments, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["videos"] == 4
    left_out, quarantine = (
        (tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("left_out.txt", "quarantine.txt")
    )
    for name, broken in (("train", quarantine), ("val", left_out)):
        assert f"{name}.csv:7 (good.mp4): label 7 is not in 0..1" in left_out
        assert f"{name}.csv:8 (good.mp4): label -1 is not in 0..1" in left_out
        assert f"{name}.csv:5 (broken.mp4): it cannot be opened as a video" in broken
        assert f"{name}.csv:9 (missing.mp4): there is no such file" in broken
        assert f"{name}.csv:6 (empty.mp4): it cannot be opened as a video" in broken
    assert "3 videos could not be used and were replaced by others" in printed
    assert "7 videos could not be used and were left out" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nope"], "no preset 'nope'; there are hmdb51, k400"),
        (["--val", ""], "--val is needed"),
        (["--train", ""], "--train is needed"),
        (["--eval-only"], "--eval-only needs --checkpoint"),
        (["--train", "sprites:10:2", "--val", "sprites:5:2"], "have the same clips"),
        (["--train", "sprites:x"], "expected 'sprites', 'sprites:LENGTH' or 'sprites:LENGTH:SEED'"),
        (["--num-classes", "3"], "sprites have 20 classes"),
        (["--model", "vit_tiny"], "adamae_vit_base_patch16_224"),
        (["--checkpoint", "/nowhere.pth"], "no checkpoint at /nowhere.pth"),
        (["--batch-size", "3", "--mixup", "0.8"], "batch_size x repeats = 3 x 1 is odd"),
        (["--layer-decay", "-1"], "layer_decay=-1.0, expected 0 or more"),
        (["--ema", "1"], "ema=1.0, expected 0.999999999 or less"),
        (["--smoothing", "1.5"], "smoothing=1.5, expected 1 or less"),
        (["--train", "/nowhere.csv"], "/nowhere.csv: no such folder or list file"),
    ],
)
def test_bad_arguments_end_with_one_clear_line(arguments, message, tmp_path):
    assert message in refused(finetune.main, "--preset", "sprites", *arguments, "--output", tmp_path)


def test_bad_labels_and_augmentation_are_refused_before_training(data, pretrained, tmp_path):
    (tmp_path / "labels.txt").write_text("run\n")
    (tmp_path / "val.csv").write_text(Path(data[3]).read_text(encoding="utf-8"), encoding="utf-8")
    for arguments, message in (
        (["--val", tmp_path / "val.csv"], "labels.txt names 1 classes, expected 3"),
        (["--randaugment", "none"], "randaugment='none', expected timm's form, such as 'rand-m7-n4-mstd0.5-inc1'"),
    ):
        settings = [*TINY, *data, "--checkpoint", pretrained, *arguments, "--output", tmp_path / "out"]
        assert message in refused(finetune.main, *settings)
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_odd_but_possible_settings_are_reported(data, pretrained, tmp_path):
    """The clips have another size than the checkpoint's, and one class has no training videos."""
    listed = [line for line in Path(data[1]).read_text(encoding="utf-8").splitlines() if not line.endswith(" 2")]
    two = Path(data[1]).parent / "two.csv"
    two.write_text("\n".join(listed) + "\n", encoding="utf-8")
    arguments = [*TINY, "--train", two, *data[2:], "--checkpoint", pretrained, "--steps", 1, "--eval-every", 0]
    printed = finetune_here(*arguments, "--img-size", 48, 48, "--output", tmp_path)
    assert "img_size (32, 32) there, (48, 48) here; position embeddings are computed anew" in printed
    assert (
        "2 of them to train on, 3 of them to test on; WARNING: 1 classes of val have no training videos, such as 2 ("
        in printed
    )
    assert "val.csv:3 (" in printed


def test_eval_only_needs_a_head(data, pretrained, tmp_path):
    said = refused(finetune.main, "--eval-only", "--checkpoint", pretrained, *data[2:], "--output", tmp_path)
    assert "has no head; --eval-only needs a classifier of finetune.py" in said


# ---- the loss by hand ----


def criterion_of(**settings):
    accelerator = make_accelerator("fp32")
    defaults = {"model": "x", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "smoothing": 0.0, "batch_size": 4}
    recipe = FinetuneRecipe(**{**defaults, **settings})
    return finetuning.Criterion(recipe, tiny_classifier().eval().to(accelerator.device), 5, accelerator), accelerator


def batch_on(device):
    video = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8)
    return {"video": video.to(device), "label": torch.tensor([0, 3, 4, 1], device=device)}


def test_label_smoothing_by_hand():
    criterion, accelerator = criterion_of(smoothing=0.1)
    batch = batch_on(accelerator.device)
    log_probs = log_softmax(criterion.model(Normalise(accelerator.device)(batch["video"])), -1)
    expected = 0.0
    for row, label in zip(log_probs, batch["label"], strict=True):
        for k in range(5):
            expected -= row[k] * (0.1 / 5 + (0.9 if k == label else 0.0)) / 4
    torch.testing.assert_close(criterion(batch, 0), expected)


def test_mixup_by_hand():
    """Each clip is blended with the one at the mirrored place of the batch, and smoothed targets in the same shares."""
    criterion, accelerator = criterion_of(mixup=0.8, smoothing=0.1)
    batch = batch_on(accelerator.device)
    pixels = Normalise(accelerator.device)(batch["video"])
    seed_libraries(7)
    video, target = criterion.augment(batch["video"], batch["label"])
    # The blending share is estimated from the pixels. Everything else has to agree with it.
    share = ((video - pixels.flip(0)) / (pixels - pixels.flip(0))).nanmedian()
    assert 0 < share < 1
    torch.testing.assert_close(video, share * pixels + (1 - share) * pixels.flip(0), rtol=1e-4, atol=1e-4)
    smooth = torch.full((4, 5), 0.1 / 5, device=accelerator.device)
    smooth[torch.arange(4), batch["label"]] = 0.9 + 0.1 / 5
    torch.testing.assert_close(target, share * smooth + (1 - share) * smooth.flip(0), rtol=1e-4, atol=1e-4)
    expected = -(log_softmax(criterion.model(video), -1) * target).sum(1).mean()
    torch.testing.assert_close(cross_entropy(criterion.model(video), target), expected)


def test_cutmix_pastes_the_same_box_into_every_frame():
    criterion, accelerator = criterion_of(cutmix=1.0)
    batch = batch_on(accelerator.device)
    pixels = Normalise(accelerator.device)(batch["video"])
    seed_libraries(3)
    video, target = criterion.augment(batch["video"], batch["label"])
    pasted = (video == pixels.flip(0)) & (video != pixels)
    boxes = pasted.any(1)  # [B, T, H, W]
    box = boxes.flatten(0, 1).any(0)  # [H, W]
    rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert box.sum() == area  # one box
    outside = ~box.expand_as(video)
    assert torch.equal(video[outside], pixels[outside])
    inside = box.expand_as(video)
    assert torch.equal(video[inside], pixels.flip(0)[inside])
    torch.testing.assert_close(1 - target[0, 0], area / (32.0 * 32), rtol=1e-4, atol=1e-4)


def test_erasing_is_noise_in_one_box_of_all_frames():
    criterion, accelerator = criterion_of(erasing=1.0)
    batch = batch_on(accelerator.device)
    pixels = Normalise(accelerator.device)(batch["video"])
    seed_libraries(0)
    video, _ = criterion.augment(batch["video"], batch["label"])
    changed = (video != pixels).any(1)  # [B, T, H, W]
    assert changed.any((1, 2, 3)).all()
    assert torch.equal(changed.all(1), changed.any(1))
    assert not torch.equal(video[0, :, 0], video[0, :, 1])
    noise = (video - pixels)[(video != pixels)]
    assert noise.isfinite().all()


def test_the_number_of_a_batch_alone_decides_its_augmentation():
    criterion, accelerator = criterion_of(mixup=0.8, cutmix=1.0, erasing=0.5)
    batch = batch_on(accelerator.device)

    def loss(number):
        torch.manual_seed(0)
        return criterion(batch, number).item()

    assert loss(3) == loss(3)
    assert len({loss(number) for number in range(6)}) == 6
