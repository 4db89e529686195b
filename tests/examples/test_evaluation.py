"""Multi-view evaluation: examples/evaluation/multi_view.py."""

import csv
import json
from pathlib import Path

import pytest
import torch
from forked import run_group
from scripts import succeeded
from test_classifier import tiny_classifier
from videos import write_video

from common.devices import Normalise, make_accelerator
from evaluation.multi_view import Evaluation, evaluate, write_results
from video_data.clips import SpriteClips
from video_data.sprites import Sprites
from video_data.video_files import VideoError
from video_data.video_lists import list_videos
from video_data.views import VideoViews

TESTS = Path(__file__).parents[1]


@pytest.fixture
def videos(tmp_path):
    """Seven videos, of which two cannot be read."""
    for number in range(5):
        write_video(tmp_path / f"{number}.mp4", frames=30, size=((64, 48), (48, 64))[number % 2], start=3 * number)
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    names = ["0.mp4 0", "1.mp4 1", "broken.mp4 2", "2.mp4 3", "missing.mp4 1", "3.mp4 4", "4.mp4 0"]
    (tmp_path / "val.csv").write_text("\n".join(names) + "\n")
    return list_videos(tmp_path / "val.csv")


def views_of(entries):
    return VideoViews(entries, 8, 2, (32, 32), "dense", clips=2, crops=3)


def test_views_are_merged_as_an_oracle_merges_them(videos):
    """The oracle loops over single views in double precision."""
    model = tiny_classifier()
    accelerator = make_accelerator("fp32")
    model.to(accelerator.device).train()
    source = views_of(videos)
    result = evaluate(model, source, accelerator, batch_size=2, workers=0)
    assert model.training
    assert result.index.tolist() == [0, 1, 3, 5, 6]
    assert result.label.tolist() == [0, 1, 3, 4, 0]
    assert len(result.left_out) == 2
    assert "val.csv:3 (broken.mp4): it cannot be opened" in result.left_out[0]
    assert "val.csv:5 (missing.mp4): there is no such file" in result.left_out[1]

    model.eval()
    normalise = Normalise(accelerator.device)
    right = 0
    for row, index in enumerate(result.index.tolist()):
        mean = torch.zeros(5, dtype=torch.float64)
        views = source.views(index)["video"]
        assert len(views) == 6
        for view in views:
            mean += model(normalise(view[None].to(accelerator.device)))[0].double().cpu().detach() / 6
        merged = mean.exp() / mean.exp().sum()
        torch.testing.assert_close(result.probabilities[row].double(), merged, rtol=1e-5, atol=1e-6)
        right += int(merged.argmax()) == result.label[row]
    assert result.summary() == {"top1": 100 * right / 5, "top5": 100.0, "videos": 5, "left_out": 2, "nonfinite": 0}


def test_rank_counts_ties_by_class_and_top5():
    probabilities = torch.tensor([
        [0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ])  # fmt: skip
    result = Evaluation(torch.arange(4), torch.tensor([1, 0, 6, 6]), probabilities, [])
    assert result.rank.tolist() == [0, 1, 6, 0]
    assert (result.top(1), result.top(5), result.top(7)) == (0.5, 0.75, 1.0)


def test_predictions_that_are_not_finite_are_wrong():
    probabilities = torch.tensor([[torch.nan, torch.nan], [0.0, torch.nan], [1.0, 0.0]])
    result = Evaluation(torch.arange(3), torch.tensor([0, 0, 0]), probabilities, [])
    assert result.rank.tolist() == [2, 2, 0]
    assert result.summary()["nonfinite"] == 2


def test_files_of_an_evaluation(tmp_path):
    result = Evaluation(
        torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0]), torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.6, 0.4]]), ["x"]
    )
    write_results(tmp_path, result, ["run", "jump, high", "never"], lambda index: f"ä/{index}.mp4", {"views": "6"})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {
        "top1": pytest.approx(200 / 3),
        "top5": 100.0,
        "videos": 3,
        "left_out": 1,
        "nonfinite": 0,
        "views": "6",
    }
    classes = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [(row["name"], row["videos"], row["top1"]) for row in classes] == [
        ("run", "1", "100.00"), ("jump, high", "2", "50.00"), ("never", "0", "")
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    assert [(row["video"], row["label"], row["rank"]) for row in rows] == [
        ("ä/0.mp4", "1", "1"), ("ä/2.mp4", "1", "2"), ("ä/3.mp4", "0", "1")
    ]  # fmt: skip
    assert rows[1]["first five classes"] == "0 1"


def test_sprites_have_one_view():
    clip = SpriteClips(Sprites(3, 8, 32, 8)).views(1)
    assert torch.equal(clip["video"][0], Sprites(3, 8, 32, 8)[1]["video"])


def test_a_list_without_a_readable_video_is_an_error(videos):
    accelerator = make_accelerator("fp32")
    broken = [videos[2], videos[4]]
    with pytest.raises(VideoError, match=r"no video could be read:\n.*broken.mp4"):
        evaluate(tiny_classifier().to(accelerator.device), views_of(broken), accelerator, 2, 0)


SCRIPT = """
import sys
sys.path[:0] = {folders!r}
import torch
from pathlib import Path
from test_classifier import tiny_classifier
from test_evaluation import views_of
from common.devices import make_accelerator
from evaluation.multi_view import evaluate
from video_data.video_lists import list_videos
torch.manual_seed(0)
accelerator = make_accelerator("fp32")
model = tiny_classifier().to(accelerator.device)
result = evaluate(model, views_of(list_videos(Path({data!r}))), accelerator, batch_size=2, workers=1)
torch.save([result.index, result.label, result.probabilities, result.left_out],
           {out!r} + f"-{{accelerator.num_processes}}-{{accelerator.process_index}}")
accelerator.end_training()
"""


@pytest.mark.slow
def test_one_and_two_processes_agree_to_the_last_bit(videos, tmp_path):
    """Seven videos in batches of two give four batches of unequal size, two for each process."""
    script = tmp_path / "script.py"
    data = str(videos[0].path.parent / "val.csv")
    folders = [str(each) for each in (TESTS, TESTS / "models", TESTS / "examples", TESTS.parent / "examples")]
    script.write_text(SCRIPT.format(folders=folders, data=data, out=str(tmp_path / "out")))
    for processes in (1, 2):
        succeeded(run_group(processes, script))
    one, *two = (torch.load(tmp_path / f"out-{name}") for name in ("1-0", "2-0", "2-1"))
    assert len(one[0]) == 5
    for other in two:
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert one[3] == other[3]
