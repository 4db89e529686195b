"""Pictures and animations: their contents, and the script that makes them."""

from pathlib import Path

import av
import pretrain
import pytest
import torch
import visualize_masks
from conftest import tiny_model
from PIL import Image
from scripts import DECODER, ENCODER, TINY_PRETRAIN, metrics, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import as_videomae
from test_classifier import tiny_classifier
from test_resume import same_weights
from videos import write_video

from adamae_sampler import AdaMAELoss
from adamae_sampler.ops import patchify
from adamae_sampler.visualize import animation, mask_overview, overview, predicted_video, save_animation
from common.models import save_weights
from pipelines import pictures
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe

SIZES = {"patch_size": 8, "tubelet_size": 2}


def step(normalize=True, channels=3, masking="adaptive"):
    model = tiny_model(in_chans=channels, masking=masking).eval()
    video = torch.randint(0, 256, (2, channels, 8, 32, 32), dtype=torch.uint8)
    prediction, sample = model(video.float() / 255)
    out = AdaMAELoss(normalize=normalize, **SIZES)(prediction, video, sample)
    return video, prediction, sample, out.token_error


def patches_of(video):
    """[B, N, pixels, C] of a clip in [0, 1]."""
    return patchify(video.float(), **SIZES).unflatten(-1, (-1, video.shape[1]))


def test_a_raw_prediction_is_shown_as_it_is():
    video, prediction, sample, _ = step()
    shown = patches_of(predicted_video(prediction, video, sample, normalize=False, **SIZES)).flatten(2)
    true = patches_of(video / 255).flatten(2)
    for clip in range(2):
        torch.testing.assert_close(shown[clip, sample.masked_idx[clip]], prediction[clip].clamp(0, 1).detach())
        torch.testing.assert_close(shown[clip, sample.visible_idx[clip]], true[clip, sample.visible_idx[clip]])


def test_a_normalised_prediction_gets_the_true_patchs_statistics_or_the_visible_ones():
    video, prediction, sample, _ = step()
    prediction = prediction * 0.1
    true = patches_of(video / 255)  # [B, N, pixels, C]
    expected = {"true": [], "visible": []}
    for clip in range(2):
        seen = true[clip, sample.visible_idx[clip]]
        for row, token in enumerate(sample.masked_idx[clip].tolist()):
            patch = prediction[clip, row].unflatten(0, (-1, 3)).detach()
            expected["true"].append(patch * true[clip, token].std(0) + true[clip, token].mean(0))
            expected["visible"].append(patch * seen.std(1).mean(0) + seen.mean((0, 1)))
    for statistics, patches in expected.items():
        shown = predicted_video(prediction, video, sample, normalize=True, statistics=statistics, **SIZES)
        found = torch.cat([patches_of(shown)[clip, sample.masked_idx[clip]] for clip in range(2)])
        torch.testing.assert_close(found, torch.stack(patches).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_the_leak_free_picture_depends_on_nothing_that_is_masked():
    video, prediction, sample, _ = step()
    masked = torch.zeros(2, 64).scatter(1, sample.masked_idx, 1.0).bool().view(2, 4, 4, 4)
    pixels = masked.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    other = torch.where(pixels, torch.randint_like(video, 0, 256), video)
    for statistics, same in (("visible", True), ("true", False)):
        one, two = (
            predicted_video(prediction, each, sample, normalize=True, statistics=statistics, **SIZES)
            for each in (video, other)
        )
        assert torch.equal(one, two) == same
    with pytest.raises(ValueError, match="expected 'true' or 'visible'"):
        predicted_video(prediction, video, sample, normalize=True, statistics="none", **SIZES)


def labels_of(figure):
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


def test_rows_are_the_papers_and_say_where_contrast_is_from():
    video, prediction, sample, error = step()
    rows = labels_of(overview(video, prediction, sample, error, normalize=True, **SIZES))
    assert [row.split("\n")[0] for row in rows] == ["video", "prediction", "error", "p", "mask"]
    assert "true" in rows[1]
    leak_free = overview(video, prediction, sample, error, normalize=True, statistics="visible", **SIZES)
    assert "visible patches" in labels_of(leak_free)[1]
    assert labels_of(overview(video, prediction, sample, error, normalize=False, **SIZES))[1] == "prediction"
    fixed = step(masking="tube", channels=1)
    assert [row.split("\n")[0] for row in labels_of(overview(*fixed, normalize=False, **SIZES))] == [
        "video", "prediction", "error", "mask"
    ]  # fmt: skip
    relative = sample.log_probs[0].exp() * 64
    assert rows[3] == f"p\n{relative.min():.2g} to {relative.max():.2g} of\na uniform one"
    assert rows[2] == f"error\n0 to {error[0].max():.2g}"
    assert rows[4] == f"mask\n{len(sample.masked_idx[0])} of 64\ntokens masked"
    columns = [axes.get_title() for axes in leak_free.axes if axes.get_title()]
    assert columns == ["frame 0", "frame 2", "frame 4", "frame 6"]


def test_error_p_and_mask_are_drawn_where_they_belong():
    video, prediction, sample, error = step()
    figure = overview(video, prediction, sample, error, normalize=True, clip=1, **SIZES)
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert len(images) == 5 * 4  # a column for each of 4 time steps
    drawn = [torch.stack([torch.tensor(image) for image in images[4 * row : 4 * row + 4]]) for row in range(5)]
    assert torch.equal(drawn[0], video[1, :, ::2].permute(1, 2, 3, 0))
    torch.testing.assert_close(drawn[2].flatten()[sample.masked_idx[1]], error[1].detach())
    assert (drawn[2].flatten()[sample.visible_idx[1]] == 0).all()
    torch.testing.assert_close(drawn[3].flatten(), sample.log_probs[1].exp().detach())
    bright = drawn[4].float().unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4, 5))  # [T, 4, 4]
    full = drawn[0].float().unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4, 5))
    assert torch.equal(((bright / full) < 0.5).flatten(), sample.mask[1])


def test_masks_of_several_ratios():
    video, _, sample, _ = step()
    figure = mask_overview(video, {"75%": sample, "the same": sample}, **SIZES)
    assert [row.split("\n")[0] for row in labels_of(figure)] == ["video", "p", "75%", "the same"]


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_an_animation_has_a_frame_for_each_frame(suffix, tmp_path):
    frames = animation(*step(), normalize=True, **SIZES)
    assert frames.dtype == torch.uint8
    assert frames.shape[0] == 8
    assert not torch.equal(frames[0], frames[1])
    save_animation(frames, tmp_path / f"a.{suffix}", fps=4)
    if suffix == "gif":
        with Image.open(tmp_path / "a.gif") as image:
            assert (image.n_frames, image.size) == (8, tuple(frames.shape[2:0:-1]))
            assert image.info["duration"] == 250
    else:
        with av.open(str(tmp_path / "a.mp4")) as container:
            read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(read) == 8
        difference = torch.tensor(read[3]).float() - frames[3, : read[3].shape[0], : read[3].shape[1]].float()
        assert difference.abs().mean() < 12  # noise, compressed by H.264 with subsampled colour
    with pytest.raises(ValueError, match=r"name a \.gif or \.mp4 file"):
        save_animation(frames, tmp_path / "a.avi")
    with pytest.raises(ValueError, match="expected uint8"):
        save_animation(frames.float(), tmp_path / "a.gif")


# ---- the script ----


@pytest.fixture
def video_file(tmp_path):
    return str(write_video(tmp_path / "clip ü.mp4", size=(96, 48)))


def test_the_script_knows_model_masking_and_target_from_the_file(video_file, tmp_path, capsys):
    recipe = PretrainRecipe(normalize_target=False, stride=3)
    save_weights(tiny_model(), tmp_path / "model.safetensors", recipe)
    common = ["--checkpoint", str(tmp_path / "model.safetensors"), "--video", video_file]
    visualize_masks.main([*common, "--output", str(tmp_path / "out"), "--mask-ratios", "0.8", "0.95"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "overview_80.png", "overview_95.png", "animation_80.gif", "animation_95.gif", "masks.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "mask ratio 80%: 12 of 64 tokens visible" in printed
    assert "mask ratio 95%: 3 of 64 tokens visible" in printed
    visualize_masks.main([*common, "--output", str(tmp_path / "mp4"), "--mask-ratios", "0.9", "--animate", "mp4"])
    assert (tmp_path / "mp4" / "animation_90.mp4").stat().st_size > 1000


@pytest.mark.parametrize("masking", ["block", "grid", "motion", "hard"])
def test_every_masking_has_pictures(masking, tmp_path, monkeypatch):
    """The row of p is there for motion masks, whose p no loss trains. Hard masks have one of predicted errors."""
    save_weights(tiny_model(masking=masking), tmp_path / "model.safetensors", PretrainRecipe(masking=masking))
    rows = []
    draw = pictures.overview
    monkeypatch.setattr(pictures, "overview", lambda *args, **how: rows.append(draw(*args, **how)) or rows[-1])
    common = ["--checkpoint", str(tmp_path / "model.safetensors"), "--video", "sprites:3:1"]
    visualize_masks.main([*common, "--mask-ratios", "0.75", "--animate", "none", "--output", str(tmp_path / "a")])
    assert {path.name for path in Path(tmp_path / "a").iterdir()} == {"overview_75.png", "masks.png"}
    assert any(row.startswith("p\n") for row in labels_of(rows[0])) == (masking == "motion")
    assert ("predicted\nto be hard" in labels_of(rows[0])) == (masking == "hard")


def test_sprites_and_a_file_without_a_sampler(tmp_path):
    torch.save(as_videomae(tiny_model().state_dict()), tmp_path / "videomae.pth")
    sizes = [*ENCODER, *DECODER, "--mask-ratios", "0.75"]
    common = ["--checkpoint", str(tmp_path / "videomae.pth"), "--video", "sprites:3:1", *sizes, "--animate", "none"]
    with pytest.raises(SystemExit, match="has no sampler for --masking adaptive; choose --masking random, tube"):
        visualize_masks.main([*common, "--output", str(tmp_path / "a")])
    visualize_masks.main([*common, "--masking", "tube", "--leak-free", "--output", str(tmp_path / "b")])
    assert {path.name for path in Path(tmp_path / "b").iterdir()} == {"overview_75.png", "masks.png"}


def test_files_and_arguments_that_cannot_be_shown_are_refused(video_file, tmp_path):
    save_weights(tiny_classifier(), tmp_path / "tuned.safetensors", FinetuneRecipe())
    with pytest.raises(SystemExit, match=r"is a classifier and has no decoder; pictures need a file of pretrain\.py"):
        visualize_masks.main(["--checkpoint", str(tmp_path / "tuned.safetensors"), "--video", video_file])
    weights = {name: each for name, each in tiny_model().state_dict().items() if name.startswith("encoder.")}
    torch.save(weights, tmp_path / "encoder.pth")
    arguments = ["--checkpoint", str(tmp_path / "encoder.pth"), "--video", video_file, *ENCODER, *DECODER]
    with pytest.raises(SystemExit, match="It has no decoder: it is an encoder alone, or a classifier"):
        visualize_masks.main(arguments)
    save_weights(tiny_model(), tmp_path / "model.safetensors", PretrainRecipe())
    model = ["--checkpoint", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out")]
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    for arguments, message in (
        ([], "--checkpoint and --video are needed"),
        ([*model, "--video", str(tmp_path / "broken.mp4")], r"broken.mp4: it cannot be opened as a video"),
        ([*model, "--video", "/nowhere.mp4"], "there is no such file"),
        ([*model, "--video", video_file, "--mask-ratios", "1.5"], "between 0 and 1"),
        ([*model, "--video", video_file, "--model", "vit_tiny"], "2"),  # tyro lists the models
        (["--checkpoint", "/nowhere.safetensors", "--video", video_file], "no checkpoint at"),
    ):
        with pytest.raises(SystemExit, match=message):
            visualize_masks.main(arguments)


def test_earlier_pictures_are_not_overwritten(tmp_path):
    save_weights(tiny_model(), tmp_path / "model.safetensors", PretrainRecipe())
    common = ["--checkpoint", str(tmp_path / "model.safetensors"), "--video", "sprites:3:1", "--animate", "none"]
    run_here(visualize_masks.main, *common, "--mask-ratios", "0.75", "--output", tmp_path / "a")
    with pytest.raises(SystemExit, match=r"already has masks.png, overview_75.png; name another folder"):
        visualize_masks.main([*common, "--mask-ratios", "0.75", "0.5", "--output", str(tmp_path / "a")])
    assert not (tmp_path / "a" / "overview_50.png").exists()


def test_pictures_go_to_tensorboard_and_change_nothing_in_the_run(tmp_path):
    common = [*TINY_PRETRAIN, "--data", "sprites:8", "--steps", 5]
    run_here(pretrain.main, *common, "--picture-every", 2, "--output", tmp_path / "with")
    printed = run_here(pretrain.main, *common, "--picture-every", 0, "--output", tmp_path / "without")
    same_weights(tmp_path / "with", tmp_path / "without")
    kept = ("step", "loss", "reconstruction", "sampling", "entropy", "coverage")
    one, other = ([{k: line[k] for k in kept} for line in metrics(tmp_path / n)] for n in ("with", "without"))
    assert one == other
    for name, steps in (("with", [2, 4]), ("without", [])):
        board = EventAccumulator(str(tmp_path / name))
        board.Reload()
        assert [each.step for each in board.Images("overview")] == steps if steps else not board.Tags()["images"]
    assert "p here, of 8 clips, as a multiple of an even p:" in printed
    assert (tmp_path / "with" / "animation.gif").exists()
