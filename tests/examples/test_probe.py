"""Frozen features, their cache, probes, and the scripts that use them."""

import json
from pathlib import Path

import extract_features
import linear_probe
import numpy as np
import pytest
import safetensors
import torch
from conftest import tiny_model
from scripts import ENCODER, run_script, succeeded
from test_checkpoint import renamed_as_official
from timm.layers import AttentionPoolLatent
from videos import write_video

from adamae_sampler.models import VideoClassifier
from common.checkpoint_header import stated_recipe, stated_sizes
from common.command_line import parse_settings
from common.devices import Normalise
from common.models import save_weights
from evaluation.features import Features
from evaluation.probes import Probe, predict, train_probe
from evaluation.settings import ProbeRecipe, ProbeSettings
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from video_data.clips import VideoClips
from video_data.transforms import PretrainTransform
from video_data.video_lists import VideoEntry, list_videos
from video_data.views import RandomViews, VideoViews

CPU = torch.device("cpu")


@pytest.fixture
def pretrained(tmp_path):
    """(model, path of its weights file)."""
    model = tiny_model().eval()
    save_weights(model, tmp_path / "model.safetensors", PretrainRecipe())
    return model, str(tmp_path / "model.safetensors")


@pytest.fixture
def videos(tmp_path):
    for number in range(5):
        write_video(tmp_path / f"{number} ü.mp4", start=4 * number, size=((64, 48), (48, 64))[number % 2])
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    lines = ["0 ü.mp4 0", "1 ü.mp4 1", "broken.mp4 0", "2 ü.mp4 1", "3 ü.mp4 0", "4 ü.mp4 1"]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "list.csv"


def by_hand(model, path, clips=2, crops=3):
    """Features of one video: output of the encoder's norm, averaged over tokens and then over views, in a loop."""
    views = VideoViews([VideoEntry(path)], 8, 2, (32, 32), "dense", clips, crops).views(0)["video"]
    total = 0
    for view in views:
        clip = Normalise(CPU)(view[None])
        tokens = model.encoder.patch_embed(clip)
        everything = torch.arange(tokens.shape[1])[None]
        total = total + model.encoder(tokens, everything)[0].mean(0).detach()
    return total / len(views)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_extracted_features_are_the_encoders(suffix, pretrained, videos, tmp_path, capsys):
    model, checkpoint = pretrained
    output = tmp_path / "out" / f"features.{suffix}"
    arguments = ["--checkpoint", checkpoint, "--data", str(videos), "--stride", "2", "--clips", "2", "--crops", "3"]
    extract_features.main([*arguments, "--output", str(output), "--workers", "0", "--batch-size", "2"])
    if suffix == "npz":
        found = np.load(output)
        features, labels, paths = torch.from_numpy(found["features"]), found["label"].tolist(), found["path"].tolist()
    else:
        with safetensors.safe_open(output, "pt") as file:
            features, labels = file.get_tensor("features"), file.get_tensor("label").tolist()
            paths = json.loads(file.metadata()["path"])
    assert labels == [0, 1, 1, 0, 1]
    assert [Path(path).name for path in paths] == [f"{number} ü.mp4" for number in range(5)]
    for row, path in zip(features, paths, strict=True):
        torch.testing.assert_close(row, by_hand(model, Path(path)), rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "list.csv:3 (broken.mp4): it cannot be opened" in printed
    assert "tensors loaded" in printed


def test_an_earlier_file_is_not_written_over(pretrained, videos, tmp_path):
    (tmp_path / "f.npz").write_text("mine")
    arguments = ["--checkpoint", pretrained[1], "--data", str(videos), "--output", str(tmp_path / "f.npz")]
    with pytest.raises(SystemExit, match=r"f.npz already exists; name another file"):
        extract_features.main(arguments)
    assert (tmp_path / "f.npz").read_text() == "mine"


def test_a_folder_and_all_tokens(pretrained, videos, tmp_path):
    output = tmp_path / "features.npz"
    arguments = ["--checkpoint", pretrained[1], "--data", str(videos.parent), "--pool", "none", "--workers", "0"]
    extract_features.main([*arguments, "--output", str(output)])
    found = np.load(output)
    assert found["features"].shape == (5, 64, 32)
    assert found["label"].tolist() == [-1] * 5


def test_features_of_a_fine_tuned_model_are_what_its_head_gets(videos, tmp_path):
    model = VideoClassifier(
        img_size=32, num_frames=8, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    save_weights(model, tmp_path / "tuned.safetensors", FinetuneRecipe())
    arguments = ["--checkpoint", str(tmp_path / "tuned.safetensors"), "--data", str(videos), "--workers", "0"]
    extract_features.main([*arguments, "--stride", "2", "--output", str(tmp_path / "f.npz")])
    (view,) = VideoViews([list_videos(videos)[0]], 8, 2, (32, 32)).views(0)["video"]
    expected = model.forward_head(model.forward_features(Normalise(CPU)(view[None])), pre_logits=True)[0]
    found = torch.from_numpy(np.load(tmp_path / "f.npz")["features"][0])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def probe_arguments(checkpoint, videos, folder, *more):
    arguments = ["--checkpoint", checkpoint, "--train", videos, "--val", videos, "--stride", 2, "--workers", 0]
    arguments += ["--cache", folder / "features", "--output", folder / "probe", *more]
    return [str(each) for each in arguments]


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_probing_twice_computes_features_once(kind, pretrained, videos, tmp_path, capsys, monkeypatch):
    arguments = probe_arguments(pretrained[1], videos, tmp_path, "--kind", kind, "--probe.epochs", 5)
    first = linear_probe.main(arguments)
    printed = capsys.readouterr().out
    assert "tensors loaded" in printed
    assert "2 videos could not be used" in printed  # the broken one, in both lists
    predictions = (tmp_path / "probe" / "predictions.csv").read_text()
    with pytest.raises(SystemExit, match=r"probe already has results.json; name another folder"):
        linear_probe.main(arguments)
    again = [*arguments, "--output", str(tmp_path / "again")]
    monkeypatch.setattr("evaluation.features.frozen_encoder", None)  # only features that are not cached call it
    assert linear_probe.main(again) == first
    assert "from " in capsys.readouterr().out
    assert (tmp_path / "again" / "predictions.csv").read_text() == predictions
    monkeypatch.undo()
    # A changed list gets features of its own.
    videos.write_text(videos.read_text(encoding="utf-8") + "0 ü.mp4 1\n", encoding="utf-8")
    linear_probe.main([*arguments, "--output", str(tmp_path / "third")])
    assert "iB into" in capsys.readouterr().out
    shape = (6, 32) if kind == "linear" else (6, 64, 32)
    found = [np.load(path).shape for path in (tmp_path / "features").glob("*/values.npy")]
    assert sorted(found)[0] == shape


def separable(count=400, width=16, classes=4, scale=1.0):
    """One cluster of features for each class, shifted and scaled so that the batch norm matters."""
    label = torch.arange(count) % classes
    centres = torch.randn(classes, width)
    return Features(torch.arange(count), label, 50 + scale * (centres[label] + 0.3 * torch.randn(count, width)), [])


def test_a_linear_probe_finds_what_logistic_regression_finds():
    torch.manual_seed(1)
    features = separable()
    probe = Probe("linear", 16, 4)
    assert not list(probe.norm.parameters())
    train_probe(probe, "linear", features, ProbeRecipe(), CPU)
    assert (predict(probe, features, CPU).argmax(1) == features.label).float().mean() > 0.97
    tiny = separable(scale=1e-3)  # the scale of the features does not matter
    train_probe(probe, "linear", tiny, ProbeRecipe(), CPU)
    assert (predict(probe, tiny, CPU).argmax(1) == tiny.label).float().mean() > 0.97


def test_a_recipe_that_trains_nothing_is_refused():
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"base_lr": 0.0}):
        with pytest.raises(ValueError, match="expected epochs and batch_size of 1 or more"):
            ProbeRecipe(**wrong)


def test_random_clips_take_turns(pretrained, videos, tmp_path, capsys):
    """Of each training video the cache has every random clip, and a step takes one of them."""
    model, checkpoint = pretrained
    more = ["--random-clips", 4, "--clips", 2, "--crops", 3, "--sampling", "segments", "--probe.epochs", 5]
    arguments = probe_arguments(checkpoint, videos, tmp_path, *more)
    linear_probe.main(arguments)
    printed = capsys.readouterr().out
    assert "4 random clips of a video" in printed
    assert "2 clips x 3 crops of a video" in printed
    found = {np.load(path).shape: np.load(path) for path in (tmp_path / "features").glob("*/values.npy")}
    assert set(found) == {(6, 4, 32), (6, 32)}  # of the list to train on, and of the list to evaluate on
    source = RandomViews(
        VideoClips(list_videos(videos), 8, 2, PretrainTransform((32, 32), flip=False), "segments"), 4, 0
    )
    views = Normalise(CPU)(source.views(0)["video"])
    wanted = model.encoder(model.encoder.patch_embed(views)).mean(1).detach()
    torch.testing.assert_close(torch.from_numpy(found[6, 4, 32][0]), wanted, rtol=1e-4, atol=1e-5)
    features = Features(torch.tensor([0, 3]), torch.tensor([0, 0]), torch.from_numpy(found[6, 4, 32]), [], 4)
    taken = {tuple(features.take(torch.tensor([1]))[0].tolist()) for _ in range(200)}
    assert taken == {tuple(clip) for clip in found[6, 4, 32][3].tolist()}
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert (results["random_clips"], results["clips"], results["crops"]) == (4, 2, 3)
    again = [*arguments, "--output", str(tmp_path / "again"), "--seed", "1"]  # other clips to train on
    linear_probe.main(again)
    assert len(list((tmp_path / "features").glob("*/values.npy"))) == 3


def test_the_probes_recipe_is_videomaes(monkeypatch):
    """SGD, momentum 0.9, no weight decay, 0.1 x 1024 / 256 after 10 of 100 epochs, then a cosine to 0."""
    rates, made = [], []

    class Recorded(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    count = 2048  # two batches
    features = Features(torch.arange(count), torch.arange(count) % 4, torch.randn(count, 8), [])
    train_probe(Probe("linear", 8, 4), "linear", features, ProbeRecipe(), CPU)
    (group,) = made[0].param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0, False)
    assert len(rates) == 200
    assert max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) in (19, 20)
    assert rates[110] == pytest.approx(0.2, abs=0.005)
    assert rates[-1] < 1e-4


def test_an_attentive_probe_finds_the_token_that_tells():
    """One token of eight, at a random place, tells the class. The mean of the tokens barely does."""
    torch.manual_seed(1)
    count, classes = 400, 4
    label = torch.arange(count) % classes
    tokens = 0.5 * torch.randn(count, 8, 16)
    place = torch.randint(8, (count,))
    tokens[torch.arange(count), place, :4] = 3 * torch.nn.functional.one_hot(label, 4).float()
    tokens[torch.arange(count), place, 4] = 6.0
    probe = Probe("attentive", 16, classes)
    assert isinstance(probe.pool, AttentionPoolLatent)
    train_probe(
        probe, "attentive", Features(torch.arange(count), label, tokens.half(), []), ProbeRecipe(epochs=100), CPU
    )
    found = predict(probe, Features(torch.arange(count), label, tokens.half(), []), CPU)
    assert (found.argmax(1) == label).float().mean() > 0.9


def test_features_are_found_by_the_places_of_readable_videos():
    values = torch.arange(10.0).view(5, 2)
    features = Features(torch.tensor([0, 3, 4]), torch.tensor([1, 0, 1]), values, ["1 and 2"])
    assert torch.equal(features.take(torch.tensor([2, 0])), values[[4, 0]])


def test_files_state_sizes_and_sampling(tmp_path, monkeypatch):
    """A folder states them too. A config.json in the working directory counts only if that folder is named."""
    save_weights(tiny_model(), tmp_path / "model.safetensors", PretrainRecipe(sampling="segments", stride=2))
    assert (
        stated_sizes(str(tmp_path))["num_heads"] == stated_sizes(str(tmp_path / "model.safetensors"))["num_heads"] == 2
    )
    settings = parse_settings(ProbeSettings(), ["--checkpoint", str(tmp_path), "--stride", "3"], "")
    assert (settings.depth, settings.img_size, settings.sampling, settings.stride) == (2, (32, 32), "segments", 3)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.chdir(tmp_path)
    assert stated_sizes("") == stated_recipe("") == {}
    with pytest.raises(ValueError, match="model_type is bert, expected videomae"):
        stated_sizes(str(tmp_path))
    config = {"model_type": "videomae", "image_size": 32, "architectures": ["VideoMAEForVideoClassification"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b", "2": "c"}}))
    assert stated_sizes(str(tmp_path))["num_classes"] == 3


def test_a_list_without_a_readable_video_is_refused(pretrained, videos, tmp_path):
    videos.write_text("broken.mp4 0\nmissing.mp4 1\n")
    with pytest.raises(SystemExit, match=r"no video could be read:\n.*broken.mp4"):
        linear_probe.main(probe_arguments(pretrained[1], videos, tmp_path))
    assert not [path for path in (tmp_path / "features").iterdir() if not path.name.endswith(".partial")]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (linear_probe, [], "--train and --val are needed"),
        (
            linear_probe,
            ["--train", "sprites:4:1", "--val", "sprites:4:2", "--img-size", "32", "32"],
            "--checkpoint is needed",
        ),
        (linear_probe, ["--train", "sprites", "--val", "sprites", "--kind", "attentive", "--clips", "2"], "one view"),
        (linear_probe, ["--train", "sprites:4:1", "--val", "sprites:8:1", "--img-size", "32", "32"], "the same clips"),
        (
            linear_probe,
            ["--train", "sprites:4:1", "--val", "sprites:4:2", "--img-size", "32", "32", "--random-clips", "2"],
            "a sprite has one clip",
        ),
        (extract_features, ["--output", "x.csv"], "name a .safetensors or .npz file"),
        (extract_features, [], "--data is needed"),
        (extract_features, ["--data", "sprites:4:1", "--img-size", "32", "32"], "--checkpoint is needed"),
        (extract_features, ["--data", "/nowhere"], "no such folder or list file"),
    ],
)
def test_bad_arguments(script, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert message in str(stopped.value)


@pytest.mark.slow
def test_two_processes_write_one_cache_and_find_what_one_finds(pretrained, videos, tmp_path):
    found = {}
    for name, processes in (("one", 1), ("two", 2)):
        arguments = probe_arguments(pretrained[1], videos, tmp_path / name, "--batch-size", 2, "--probe.epochs", 3)
        succeeded(run_script("linear_probe.py", *arguments, processes=processes))
        (values,) = (tmp_path / name / "features").glob("*/values.npy")
        found[name] = np.load(values), (tmp_path / name / "probe" / "predictions.csv").read_text()
    assert np.array_equal(found["one"][0], found["two"][0])
    assert found["one"][1] == found["two"][1]


def test_probing_starts_from_every_format(videos, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.save(renamed_as_official(tiny_model().state_dict()), tmp_path / "official.pth")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1,
    )  # fmt: skip
    for name, pooling in (("norm", False), ("pooling", True)):  # with mean pooling, the default, there is no last norm
        config.use_mean_pooling = pooling
        transformers.VideoMAEForPreTraining(config).save_pretrained(tmp_path / name)
    encoder = len([name for name in tiny_model().state_dict() if name.startswith("encoder.")])
    for checkpoint, sizes, name, parameters in (
        ("official.pth", ENCODER, "official AdaMAE", encoder),
        ("norm", (), "Hugging Face VideoMAE", encoder),
        ("pooling", (), "Hugging Face VideoMAE", encoder - 2),
    ):
        folder = tmp_path / f"probe of {checkpoint}"
        arguments = probe_arguments(str(tmp_path / checkpoint), videos, folder, *sizes, "--probe.epochs", 1)
        linear_probe.main(arguments)
        assert f"{name} checkpoint: {parameters} tensors loaded" in capsys.readouterr().out
    weights = {name: each for name, each in tiny_model().state_dict().items() if name.startswith("decoder.")}
    torch.save(weights, tmp_path / "decoder.pth")
    for checkpoint, more, message in (
        ("decoder.pth", ENCODER, "none of the formats known"),
        ("official.pth", [*ENCODER, "--depth", "3"], "lacks 13 of the model's"),
    ):
        with pytest.raises(SystemExit, match=message):
            linear_probe.main(probe_arguments(str(tmp_path / checkpoint), videos, tmp_path / "refused", *more))
