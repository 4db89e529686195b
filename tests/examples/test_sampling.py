"""The frames of a clip, and the crops of evaluation: examples/video_data/frame_sampling.py and transforms.py."""

import itertools
import random
from unittest import mock

import numpy as np
import pytest
import torch
from videos import generator, seen_indices, write_video

from video_data.clips import VideoClips
from video_data.frame_sampling import fixed_clips, random_clip
from video_data.transforms import FinetuneTransform, PretrainTransform, fixed_crops, seeded
from video_data.video import Video
from video_data.video_files import VideoError
from video_data.video_lists import VideoEntry
from video_data.views import RandomViews, VideoViews


def test_dense_clips_start_anywhere_that_fits():
    for seed in range(50):
        indices = random_clip("dense", 100, 16, 4, generator(seed))
        assert [b - a for a, b in itertools.pairwise(indices)] == [4] * 15
        assert indices[0] >= 0
        assert indices[-1] <= 99
    starts = {random_clip("dense", 100, 16, 4, generator(seed))[0] for seed in range(2000)}
    assert starts == set(range(37))  # every start of 64 frames that fit, the first and the last among them
    assert random_clip("dense", 61, 16, 4, generator()) == list(range(0, 61, 4))  # all of its frames
    assert random_clip("dense", 10, 4, 4, generator()) == [0, 4, 8, 8]  # too short: its frames, then the last of them
    assert random_clip("dense", 1, 3, 2, generator()) == [0, 0, 0]


def test_segments_give_one_frame_each():
    """TSN's rule: segment s of n has the frames from s/n to (s + 1)/n of the video, all equally likely."""
    seen = [set() for _ in range(4)]
    for seed in range(400):
        for segment, index in enumerate(random_clip("segments", 40, 4, 99, generator(seed))):
            seen[segment].add(index)
    assert seen == [set(range(10 * s, 10 * s + 10)) for s in range(4)]
    uneven = {tuple(random_clip("segments", 7, 3, 1, generator(seed))) for seed in range(500)}
    assert {index for clip in uneven for index in clip} == set(range(7))  # no frame at the end is lost
    for length in (1, 2, 3, 5):  # shorter than the clip: frames in order, with counts that differ by at most 1
        for seed in range(50):
            clip = random_clip("segments", length, 8, 1, generator(seed))
            assert clip == sorted(clip)
            assert max(clip) < length
        middle = fixed_clips("segments", length, 8, 1, 1)[0]
        counts = [middle.count(frame) for frame in range(length)]
        assert max(counts) - min(counts) <= 1


def test_fixed_clips():
    assert fixed_clips("dense", 100, 4, 10, 1) == [[30, 40, 50, 60]]  # starts are 0, 10, ... 60
    assert [clip[0] for clip in fixed_clips("dense", 100, 4, 10, 5)] == [0, 10, 30, 40, 60]
    assert fixed_clips("dense", 5, 4, 2, 3) == [[0, 2, 4, 4]] * 3  # too short for more than one
    assert fixed_clips("segments", 40, 4, 1, 1) == [[5, 15, 25, 35]]
    assert fixed_clips("segments", 40, 4, 1, 2) == [[0, 10, 20, 30], [5, 15, 25, 35]]  # VideoMAE's two clips
    assert fixed_clips("segments", 1, 4, 1, 2) == [[0] * 4] * 2


@pytest.mark.parametrize(("stride", "clips"), [(4, 5), (2, 10), (4, 2)])
def test_dense_test_clips_are_the_official_codes(stride, clips):
    """It takes every stride-th frame of the video, repeats the last of these up to 16, and cuts clips of 16 whose
    starts are as far apart as they can be."""
    for length in (1, 15, 16, 61, 64, 65, 100, 250, 299, 300):
        kept = list(range(0, length, stride))
        kept += [kept[-1]] * (16 - len(kept))
        step = (len(kept) - 16) / (clips - 1)
        wanted = [kept[int(number * step) :][:16] for number in range(clips)]
        assert fixed_clips("dense", length, 16, stride, clips) == wanted, length


@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_a_video_without_frames_is_an_error(sampling):
    with pytest.raises(VideoError, match="no frames"):
        random_clip(sampling, 0, 16, 4, generator())
    with pytest.raises(VideoError, match="no frames"):
        fixed_clips(sampling, 0, 16, 4, 2)


def test_fixed_crops_of_landscape_portrait_and_square():
    """The pixels of the frame are its coordinates, so a crop shows its place."""
    for height, width in ((60, 100), (100, 60), (60, 60), (30, 50), (61, 97)):
        ramp = torch.stack([torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width),
                            torch.zeros(height, width)])[None].float()  # fmt: skip
        crops = fixed_crops(ramp, (60, 60), 3)
        assert [crop.shape for crop in crops] == [(1, 3, 60, 60)] * 3
        assert torch.equal(fixed_crops(ramp, (60, 60), 1)[0], crops[1])  # one crop is the middle one
        scale = min(height, width) / 60
        for crop, share in zip(crops, (0, 0.5, 1), strict=True):
            top, left = crop[0, 0, :, 30].min(), crop[0, 1, 30].min()
            expected = ((height - 60 * scale) * share, (width - 60 * scale) * share)
            assert (top, left) == pytest.approx(expected, abs=1.5)
    wide = fixed_crops(torch.zeros(2, 3, 60, 100), (32, 48), 3)
    assert wide[0].shape == (2, 3, 32, 48)


def test_views_take_clips_and_crops_of_one_reading(tmp_path):
    path = write_video(tmp_path / "a.mp4", size=(96, 48))
    source = VideoViews([VideoEntry(path, 3, start=4, frames=30)], 4, 5, (32, 32), "dense", clips=3, crops=2)
    item = source.views(0)
    assert (item["label"], item["video"].shape, item["video"].dtype) == (3, (6, 3, 4, 32, 32), torch.uint8)
    found = [seen_indices(view.transpose(0, 1)) for view in item["video"]]
    starts = [4, 4, 4 + 5, 4 + 5, 4 + 10, 4 + 10]  # every fifth of 30 frames makes 6, the last start is 10
    assert found == [[start + 5 * step for step in range(4)] for start in starts]


def test_test_crops_have_the_official_size():
    """The shorter side becomes the crop's, the longer one int(crop x longer / shorter), which is 398 for 720p."""
    for height, width in ((720, 1280), (1280, 720), (240, 427), (333, 500), (224, 300)):
        with mock.patch("video_data.transforms.tvf.crop") as crop:
            fixed_crops(torch.zeros(1, 3, height, width), (224, 224), 3)
        seen = [(call.args[0].shape, call.args[1:]) for call in crop.call_args_list]
        longer = int(224 * max(height, width) / min(height, width))
        assert {shape[-2:] for shape, _ in seen} == {(224, longer) if width > height else (longer, 224)}
        places = [int(number * (longer - 224) / 2) for number in range(3)]
        assert [max(box[:2]) for _, box in seen] == places


def test_random_views_are_random_and_the_same_again(tmp_path, monkeypatch):
    reads = []
    read = Video.read
    monkeypatch.setattr(Video, "read", lambda self, indices: reads.append(len(indices)) or read(self, indices))
    entries = [VideoEntry(write_video(tmp_path / f"{n}.mp4", size=(96, 48)), n, start=4, frames=30) for n in range(2)]

    def views(index, seed=0):
        source = VideoClips(entries, 4, 1, PretrainTransform((32, 32), flip=False), "segments")
        return RandomViews(source, 6, seed).views(index)

    item = views(0)
    assert (item["label"], item["video"].shape, item["video"].dtype) == (0, (6, 3, 4, 32, 32), torch.uint8)
    assert len(reads) == 1  # the frames of all clips, decoded once
    assert torch.equal(item["video"], views(0)["video"])
    frames = [tuple(seen_indices(view.transpose(0, 1))) for view in item["video"]]
    assert len(set(frames)) > 3
    for clip in frames:  # one of each quarter of the part from frame 4 to 33
        assert all(
            4 + 7.5 * segment <= place + 1 and place < 4 + 7.5 * (segment + 1) for segment, place in enumerate(clip)
        )
    assert not torch.equal(item["video"], views(1)["video"])
    assert not torch.equal(item["video"], views(0, seed=1)["video"])


def test_segments_of_a_real_file(tmp_path):
    entry = VideoEntry(write_video(tmp_path / "a.mp4"), 3)
    (clip,) = VideoViews([entry], 8, 1, (16, 16), "segments").views(0)["video"]
    assert seen_indices(clip.transpose(0, 1)) == [2, 7, 12, 17, 22, 27, 32, 37]


def frames_of_noise(count=4, height=48, width=64):
    frame = torch.randint(0, 256, (1, 3, height // 8, width // 8), dtype=torch.uint8)
    return frame.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(count, -1, -1, -1)


def test_randaugment_does_the_same_to_all_frames_and_something_else_each_time():
    transform = FinetuneTransform((32, 32), "rand-m7-n4-mstd0.5-inc1", flip=True)
    frames = frames_of_noise()
    found = []
    for seed in range(8):
        clip = transform(frames, generator(seed))
        assert (clip.shape, clip.dtype) == ((4, 3, 32, 32), torch.uint8)
        assert all(torch.equal(clip[0], frame) for frame in clip)
        assert torch.equal(clip, transform(frames, generator(seed)))
        found.append(clip)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_randaugment_is_timms():
    """With the same seed, timm alone gives the same first frame."""
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    frames = frames_of_noise(1, 32, 32)
    transform = FinetuneTransform((32, 32), "rand-m9-n2-mstd0.5-inc1", flip=False)
    transform.crop = lambda frames: frames
    seed = int(torch.randint(2**31, (), generator=generator(3)))
    timms = rand_augment_transform("rand-m9-n2-mstd0.5-inc1", {"translate_const": 14, "img_mean": (124, 116, 104)})
    with seeded(seed):
        expected = pil_to_tensor(timms(to_pil_image(frames[0])))
    assert torch.equal(transform(frames, generator(3))[0], expected)


def test_without_randaugment_a_crop_is_a_crop():
    transform = FinetuneTransform((32, 32), "", flip=False)
    flat = torch.full((2, 3, 50, 70), 77, dtype=torch.uint8)
    assert (transform(flat, generator()) == 77).all()


def test_seeding_leaves_the_global_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])  # noqa: NPY002
    with seeded(5):
        first = draw()
    with seeded(5):
        assert draw() == first
    assert draw() == expected


def test_repeats_are_augmented_apart_from_one_decoding(tmp_path, monkeypatch):
    entry = VideoEntry(write_video(tmp_path / "a.mp4"), 6)
    reads = []
    monkeypatch.setattr(
        "video_data.video.Video.read", lambda self, indices: reads.append(1) or frames_of_noise(len(indices))
    )
    source = VideoClips([entry], 4, 2, FinetuneTransform((16, 16), "", flip=True), repeats=3)
    item = source.clips(0, generator())
    assert item["label"].tolist() == [6, 6, 6]
    assert item["video"].shape == (3, 3, 4, 16, 16)
    assert len(reads) == 1
    assert not torch.equal(item["video"][0], item["video"][1])
