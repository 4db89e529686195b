"""Reading videos, lists, clips and sprites: examples/video_data."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from videos import FRAMES, generator, seen_indices, write_video

from video_data.clips import ClipStream, VideoClips, collate_clips
from video_data.sprites import Sprites
from video_data.transforms import PretrainTransform, multi_scale_crop, random_flip
from video_data.video import Video
from video_data.video_files import Unreachable, VideoError
from video_data.video_lists import VideoEntry, list_videos

# With B-frames (bf) packets are not in the order of frames. AVI and MPEG-PS state no presentation times.
CONTAINERS = [
    ("a.mp4", "libx264", {"g": "10", "crf": "1"}),
    ("a.mkv", "libx264", {"g": "10", "crf": "1", "bf": "3"}),
    ("a.webm", "libvpx-vp9", {"g": "10"}),
    ("a.avi", "mpeg4", {"g": "10"}),
    ("b.avi", "mpeg4", {"g": "10", "bf": "2", "b": "4M"}),
    ("c.avi", "libx264", {"g": "10", "bf": "2", "crf": "1"}),
    ("b.mp4", "mpeg4", {"g": "10", "bf": "2", "b": "4M"}),
    ("a.mpg", "mpeg2video", {"g": "10", "bf": "2", "b": "4M"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS, ids=lambda value: str(value))
def test_read_frames_returns_the_frames_asked_for(tmp_path, name, codec, options):
    path = write_video(tmp_path / name, codec=codec, options=options)
    for indices in ([0], [0, 1, 2], [3, 11, 25, 39], [39], [17, 17, 30], [10, 12, 14, 16], [20], [9]):
        with Video(path) as video:
            assert video.count() == FRAMES
            frames = video.read(indices)
        assert (frames.dtype, frames.shape) == (torch.uint8, (len(indices), 3, 48, 64))
        assert seen_indices(frames) == indices


def test_an_index_that_a_variable_rate_skips_gives_the_frame_on_screen(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in [*range(20), *range(23, 40)]:  # nothing new at 20, 21 and 22
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * index, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with Video(path) as video:
        assert seen_indices(video.read([19, 20, 22, 23, 30])) == [19, 19, 19, 23, 30]


def test_broken_videos_say_why(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", frames=200).read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    faststart = write_video(tmp_path / "fast.mkv", frames=200).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(faststart[: len(faststart) // 2])
    for name, message in {
        "missing.mp4": "no such file",
        "truncated.mp4": "cannot be opened",
        "empty.mp4": "cannot be opened",
        "text.mp4": "cannot be opened",
    }.items():
        with pytest.raises(VideoError, match=message):
            Video(tmp_path / name)
    with Video(tmp_path / "cut.mkv") as video, pytest.raises(VideoError, match=r"(broken or trunc|cannot be decoded)"):
        video.read([0, 199])


@pytest.mark.parametrize(("height", "width"), [(180, 320), (320, 180), (37, 41), (8, 9)])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_multi_scale_crop(height, width, size):
    ramp = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width).expand(2, 3, -1, -1) / (
        height * width
    )
    shapes = set()
    for seed in range(40):
        crop = multi_scale_crop(ramp, size, generator(seed))
        assert crop.shape == (2, 3, *size)
        assert torch.equal(crop[0], crop[1])  # one crop for all frames
        assert 0 <= crop.min() <= crop.max() <= 1
        shapes.add(crop[0, 0, 0, 0].item())
    assert len(shapes) > 3
    assert torch.equal(multi_scale_crop(ramp, size, generator(1)), multi_scale_crop(ramp, size, generator(1)))


@pytest.mark.parametrize(
    ("height", "width", "target", "sides"),
    [
        (200, 300, 100, (200, 175, 150, 132)),
        (240, 427, 224, (240, 210, 180, 158)),  # SSv2
        (320, 568, 224, (320, 280, 240, 211)),  # Kinetics
        (226, 300, 224, (224, 197, 169, 149)),  # less than 3 from the target's size: that size
        (222, 222, 224, (222, 194, 166, 146)),  # but not more than the frame has
    ],
)
def test_multi_scale_crop_has_the_official_sizes(monkeypatch, height, width, target, sides):
    seen = set()
    monkeypatch.setattr(
        "video_data.transforms.tvf.resized_crop",
        lambda frames, top, left, h, w, size, antialias: seen.add((h, w)) or frames,
    )
    for seed in range(400):
        multi_scale_crop(torch.zeros(1, 3, height, width), (target, target), generator(seed))
    allowed = {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1}
    assert seen == allowed


def test_random_flip_mirrors_half():
    frames = torch.arange(4.0).view(1, 1, 1, 4)
    flipped = [random_flip(frames, generator(seed)).flatten().tolist() for seed in range(400)]
    assert sorted(map(tuple, {tuple(each) for each in flipped})) == [(0, 1, 2, 3), (3, 2, 1, 0)]
    assert 140 < sum(each[0] == 3 for each in flipped) < 260


def test_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    listing = tmp_path / "train.csv"
    listing.write_text(
        "# a comment\nsub/ä b.mp4 7\n\n/abs/c.mp4 10 32 3\nd.mp4\t5 -1\t2\n e.mp4\t-1\n", encoding="utf-8"
    )
    first, second, third, fourth = list_videos(listing)
    assert first == VideoEntry(tmp_path / "sub/ä b.mp4", 7, 0, None, f"{listing}:2 (sub/ä b.mp4)")
    assert (str(second.path), second.label, second.start, second.frames) == ("/abs/c.mp4", 3, 10, 32)
    assert (third.start, third.frames, third.label) == (5, None, 2)
    assert (fourth.path.name, fourth.label) == ("e.mp4", -1)


@pytest.mark.parametrize(
    "line", ["video.mp4", "video.mp4 x", "video.mp4 1.5", "5", "a.mp4 0 -1", "a.mp4 -3 5 1", "a.mp4 --5"]
)
def test_a_malformed_line_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(ValueError, match=r"list.txt:2: .* expected 'path label' or 'path start frames label'"):
        list_videos(tmp_path / "list.txt")


def test_folders_with_and_without_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or list file"):
        list_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no video"):
        list_videos(tmp_path)
    for name in ("b.mp4", "sub/a.AVI", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [entry.path.name for entry in list_videos(tmp_path)] == ["b.mp4", "a.AVI"]


def test_video_clips_honour_segments_stride_and_size(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    clips = VideoClips([VideoEntry(path, 4, start=10, frames=12)], 4, 3, PretrainTransform((32, 48), flip=False))
    for seed in range(20):
        clip = clips.clips(0, generator(seed))
        assert clip["label"].tolist() == [4]
        assert (clip["video"].dtype, clip["video"].shape) == (torch.uint8, (1, 3, 4, 32, 48))
        indices = seen_indices(clip["video"][0].transpose(0, 1))
        assert indices[0] >= 10
        assert indices[-1] < 22
        assert [b - a for a, b in itertools.pairwise(indices)] == [3, 3, 3]


def stream_of(source, start=0, stop=12, seed=0):
    return ClipStream(source, start, stop, seed)


def test_a_stream_is_a_function_of_position(tmp_path):
    entries = [VideoEntry(write_video(tmp_path / f"{i}.mp4", frames=30), i) for i in range(4)]
    source = VideoClips(entries, 4, 2, PretrainTransform((16, 16), flip=True))
    whole = [stream_of(source)[i] for i in range(12)]
    for epoch in range(3):
        assert sorted(item["label"] for item in whole[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    resumed = stream_of(source, start=5)
    assert len(resumed) == 7
    for item, expected in zip((resumed[i] for i in (6, 0, 3)), (whole[11], whole[5], whole[8]), strict=True):
        assert torch.equal(item["video"], expected["video"])
    assert any(
        not torch.equal(a["video"], b["video"])
        for a, b in zip(whole, (stream_of(source, seed=1)[i] for i in range(12)), strict=True)
    )
    for workers in (0, 2):
        batches = list(DataLoader(stream_of(source), batch_size=6, num_workers=workers, collate_fn=collate_clips))
        videos = torch.cat([batch["video"] for batch in batches])
        assert torch.equal(videos, torch.cat([item["video"] for item in whole]))


def test_broken_videos_are_replaced_and_reported_with_their_line(tmp_path):
    write_video(tmp_path / "good.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "list.csv").write_text("good.mp4 1\nbroken.mp4 2\nmissing.mp4 3\n")
    source = VideoClips(list_videos(tmp_path / "list.csv"), 4, 2, PretrainTransform((16, 16), flip=False))
    batch = next(iter(DataLoader(stream_of(source, stop=6), batch_size=6, collate_fn=collate_clips)))
    assert batch["label"].tolist() == [1] * 6
    assert batch["video"].shape == (6, 3, 4, 16, 16)
    assert set(batch["left_out"]) == {str(tmp_path / "broken.mp4"), str(tmp_path / "missing.mp4")}
    assert "list.csv:2 (broken.mp4): it cannot be opened as a video" in batch["left_out"][str(tmp_path / "broken.mp4")]
    assert "list.csv:3 (missing.mp4): there is no such file" in batch["left_out"][str(tmp_path / "missing.mp4")]


class Flaky:
    """A source whose videos fail a few times. Each draws a random number before it fails."""

    def __init__(self, failures):
        self.failures = dict(failures)
        self.tried = []

    def __len__(self):
        return 8

    def name(self, index):
        return f"video {index}"

    key = name

    def clips(self, index, generator):
        self.tried.append(index)
        drawn = torch.rand((), generator=generator)
        if self.failures.get(index, 0):
            self.failures[index] -= 1
            raise VideoError(f"video {index} has a bad moment")
        return {"video": drawn, "label": index}


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("video_data.clips._PAUSES", (0, 0))


@pytest.mark.usefixtures("no_pauses")
def test_a_video_is_tried_three_times_and_draws_as_if_once():
    whole, flaky = stream_of(Flaky({})), stream_of(Flaky({2: 2}))
    for position in range(8):
        assert flaky[position] == whole[position]
    assert flaky.source.tried.count(2) == 3


@pytest.mark.usefixtures("no_pauses")
def test_the_clip_at_a_position_does_not_depend_on_the_quarantine():
    found = stream_of(Flaky({2: 99, 5: 99}), stop=24)
    items = [found[position] for position in range(24)]
    assert {name for item in items for name in item["left_out"]} == {"video 2", "video 5"}
    known = ClipStream(Flaky({2: 99, 5: 99}), 0, 24, 0, ["video 2", "video 5"])
    assert [known[position] for position in range(24)] == items
    # A video is tried three times until it is known to be broken, and once each time after that.
    assert found.source.tried.count(2) == known.source.tried.count(2) + 2 > 3


def test_unreachable_videos_are_retried_and_not_quarantined(monkeypatch):
    class Away(Flaky):
        def clips(self, index, generator):
            if self.failures.get(index, 0):
                self.failures[index] -= 1
                raise Unreachable("the shard cannot be read")
            return super().clips(index, generator)

    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    stream = stream_of(Away({2: 3}))
    items = [stream[position] for position in range(8)]
    assert [item["label"] for item in items] == [stream_of(Flaky({}))[position]["label"] for position in range(8)]
    assert not any(item["left_out"] for item in items)
    assert pauses == [1, 2, 4]
    gone = stream_of(Away(dict.fromkeys(range(8), 99)))
    with pytest.raises(VideoError, match="the shard cannot be read; tried for 123 seconds"):
        gone[0]


def test_names_of_the_videos_of_a_step():
    stream = stream_of(Flaky({}), stop=24)
    labels = [stream[position]["label"] for position in range(24)]
    assert stream.names(4, 20) == [f"video {label}" for label in labels[4:20]]


def test_a_run_without_any_readable_video_stops(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4 1\nb.mp4 2\n")
    source = VideoClips(list_videos(tmp_path / "list.csv"), 4, 2, PretrainTransform((16, 16), flip=False))
    with pytest.raises(
        VideoError, match=r"20 videos in a row could not be read:(.|\n)*list.csv:1 (.|\n)*list.csv:2|list.csv:2"
    ):
        stream_of(source)[0]


def test_sprites_are_a_function_of_seed_and_index():
    clips, same, other = Sprites(length=50), Sprites(length=50), Sprites(length=50, seed=1)
    for index in (7, 0, 49):
        one, two = clips[index], same[index]
        assert torch.equal(one["video"], two["video"])
        assert one["label"] == two["label"]
        assert not torch.equal(one["video"], other[index]["video"])
    labels = torch.tensor([Sprites(length=2000)[i]["label"] for i in range(2000)]).bincount(minlength=20)
    assert labels.min() > 50
    with pytest.raises(IndexError, match="no clip 50; expected 0 to 49"):
        clips[50]


@pytest.mark.parametrize("size", [{}, {"num_frames": 8, "img_size": 48, "patch_size": 16, "tubelet_size": 4}])
def test_tokens_not_marked_as_moving_are_still(size):
    clips = Sprites(length=40, **size)
    checked_tokens = 0
    for index in range(40):
        clip = clips[index]
        t, p = clips.tubelet_size, clips.patch_size
        moving = clip["moving"].view(clips.num_frames // t, clips.img_size // p, clips.img_size // p)
        moving = moving.repeat_interleave(t, 0).repeat_interleave(p, 1).repeat_interleave(p, 2)  # [T, H, W]
        video = clip["video"].int()
        high = video.masked_fill(moving, -1).amax(1)  # [3, H, W], over frames where a pixel's token is still
        low = video.masked_fill(moving, 256).amin(1)
        known = (~moving).any(0)
        assert torch.equal(high[:, known], low[:, known])
        # Where the still background is known, every token marked as moving has a pixel that differs from it.
        differs = ((video != high[:, None]).any(0) & known & moving).float()
        tokens = differs.unflatten(0, (-1, t)).unflatten(2, (-1, p)).unflatten(4, (-1, p)).sum((1, 3, 5))
        known_tokens = known.expand_as(moving).float().unflatten(0, (-1, t)).unflatten(2, (-1, p)).unflatten(4, (-1, p))
        checked = clip["moving"].view_as(tokens).bool() & (known_tokens.amin((1, 3, 5)) > 0)
        checked_tokens += int(checked.sum())
        assert (tokens[checked] > 0).all()
    assert checked_tokens > 50


def test_a_still_sprite_of_the_same_contrast_is_marked():
    clips = Sprites(length=60)
    contrasts = []
    for index in range(60):
        clip = clips[index]
        still, moving = clip["still"].view(8, 8, 8), clip["moving"].view(8, 8, 8)  # [T, H, W]
        assert not (still & moving).any()
        where = still.any(0)
        assert where.any()
        assert (still | moving)[:, where].all()  # it is there all the time, hidden only by the sprite that moves
        pixels = clip["video"].float().view(3, 8, 2, 8, 8, 8, 8).permute(1, 3, 5, 0, 2, 4, 6).flatten(4)
        spread = pixels.std(-1).mean(-1)  # [T, H, W], of each token
        contrasts.append([spread[kind].mean() for kind in (moving, still, ~(moving | still))])
    moving, still, background = torch.tensor(contrasts).mean(0)
    assert 0.7 < moving / still < 1.4
    assert background < 0.5 * still


def test_share_of_moving_tokens_and_direction():
    clips = Sprites(length=200)
    shares = torch.tensor([clips[i]["moving"].float().mean() for i in range(200)])
    assert 0.10 < shares.mean() < 0.20
    angle = torch.arange(8) * torch.pi / 4
    for index in range(100):
        clip = clips[index]
        grid = clip["moving"].view(8, 8, 8).float()
        direction = clip["label"] % 4  # right, down, left, up
        along = grid.sum(1) if direction in (0, 2) else grid.sum(2)  # [T, 8] along the axis of motion
        phase = torch.atan2((along * angle.sin()).sum(1), (along * angle.cos()).sum(1))  # of the centre, on the circle
        turned = (phase.diff() + torch.pi) % (2 * torch.pi) - torch.pi
        assert (turned.sum() > 0) == (direction in (0, 1))
