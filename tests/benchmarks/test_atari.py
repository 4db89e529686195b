"""Clips of Atari games: labels against pixels, splits, seeds and the cache."""

import hashlib
import itertools
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("ale_py", reason="the games come with ale-py")

from benchmarks.masking import atari
from benchmarks.masking.atari import ABSENT, LABELS, Sizes, Splits, load, moved

SIZES = Sizes(train=100, probe_train=10, probe_test=12)
EPISODE_FRAMES = 400

# The colour of each object, the colour behind it, and the rows and columns of the kept frames to search.
BROWN, GREEN, BLACK = (144, 72, 17), (110, 156, 66), (0, 0, 0)
COURT, RING = (slice(8, 88), slice(0, 80)), (slice(9, 79), slice(16, 64))
OBJECTS = {
    ("pong", "player"): ((92, 186, 92), BROWN, COURT),
    ("pong", "enemy"): ((213, 130, 74), BROWN, COURT),
    ("pong", "ball"): ((236, 236, 236), BROWN, COURT),
    ("boxing", "player"): ((214, 214, 214), GREEN, RING),
    ("boxing", "enemy"): (BLACK, GREEN, RING),
    ("breakout", "player"): ((200, 72, 72), BLACK, (slice(85, 88), slice(4, 76))),
    ("breakout", "ball"): ((200, 72, 72), BLACK, (slice(38, 96), slice(4, 76))),  # below the bricks
}
BALL, PADDLE = 2, 16  # areas in pixels of the kept frames
PADDLE_ROWS = slice(85 - 38, 88 - 38)  # among the rows of Breakout's ball
ARMS_IN = 8  # columns of a boxer who does not punch

CASES = [(game, label) for game, labels in LABELS.items() for label in labels]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atari")
    return {game: load(game, 3, SIZES, folder, episode_frames=EPISODE_FRAMES) for game in LABELS}


def coverage(video, game, item):
    """The share of each pixel that the object covers, [frames, rows, columns], of the region to search."""
    colour, behind, (rows, columns) = OBJECTS[game, item]
    pixels = video.transpose(1, 2).flatten(0, 1)[:, :, rows, columns].float()
    origin = torch.tensor(behind).view(3, 1, 1)
    line = torch.tensor(colour).view(3, 1, 1) - origin
    share = ((pixels - origin) * line).sum(1) / (line * line).sum()
    off_line = (pixels - origin - share[:, None] * line).abs().amax(1)
    share = torch.where((off_line < 4) & (share > 0.1), share, 0)
    if (game, item) == ("breakout", "ball"):
        share[:, PADDLE_ROWS] = 0  # ball and paddle have one colour
    return share


def shown_whole(covered, game, item):
    """The frames that show all of the object, and nothing of its colour elsewhere."""
    columns = (covered > 0).any(1)
    if game == "boxing":
        place = torch.arange(columns.shape[1])
        return (columns * place).amax(1) - torch.where(columns, place, 99).amin(1) < ARMS_IN
    area = covered.sum((1, 2))
    return (area - (BALL if item == "ball" else PADDLE)).abs() < 0.1


@pytest.mark.parametrize(("game", "label"), CASES)
def test_a_label_is_the_place_of_its_object_in_the_pixels(game, label, made):
    clips, (item, axis) = made[game].train, label.split("_")
    covered = coverage(clips.video, game, item)
    weights = covered.sum({"x": 1, "y": 2}[axis])
    place = (weights * torch.arange(weights.shape[1])).sum(1) / weights.sum(1)
    value = clips.labels[label].flatten()
    chosen = shown_whole(covered, game, item) & (value != ABSENT)
    assert chosen.sum() > 200
    x, y = value[chosen].double().numpy(), place[chosen].double().numpy()
    assert np.corrcoef(x, y)[0, 1] > 0.98
    assert np.polyfit(x, y, 1)[0] == pytest.approx(0.5, rel=0.01), "a step in the RAM is a pixel of the whole screen"


@pytest.mark.parametrize(("game", "item"), [("pong", "ball"), ("pong", "enemy"), ("breakout", "ball")])
def test_a_label_is_absent_where_the_screen_does_not_show_the_object(game, item, made):
    clips = made[game].train
    seen = coverage(clips.video, game, item).sum((1, 2)) > 0.1
    value = clips.labels[f"{item}_y"].flatten()
    absent = value == ABSENT
    assert 0.02 < absent.float().mean() < 0.5
    assert not (seen & absent).any()
    if game == "breakout":  # elsewhere bricks or the paddle hide the ball
        in_the_open = ((value > 88) & (value < 170)) | (value > 181)
        assert (value > 181).any()
        seen, absent = seen[in_the_open], absent[in_the_open]
    assert (seen | absent).float().mean() > 0.99
    for name, each in clips.labels.items():
        if name.startswith(item):
            assert torch.equal(each == ABSENT, clips.labels[f"{item}_y"] == ABSENT)


@pytest.mark.parametrize("game", LABELS)
def test_shapes_and_types(game, made):
    assert isinstance(made[game], Splits)
    for clips, count in zip(made[game], SIZES, strict=True):
        assert (clips.video.shape, clips.video.dtype) == ((count, 3, 8, 96, 80), torch.uint8)
        assert list(clips.labels) == list(LABELS[game])
        assert {(each.shape, each.dtype) for each in clips.labels.values()} == {((count, 8), torch.int16)}
        assert (clips.episode.shape, clips.episode.dtype) == ((count,), torch.int32)


@pytest.mark.parametrize("game", LABELS)
def test_an_episode_is_in_one_split_and_is_cut_off(game, made):
    episodes = [set(clips.episode.tolist()) for clips in made[game]]
    assert len(episodes[0]) > 1
    assert not any(a & b for a, b in itertools.combinations(episodes, 2))
    for clips in made[game]:
        assert torch.unique(clips.episode, return_counts=True)[1].max() <= EPISODE_FRAMES // 8


def digest(splits):
    done = hashlib.sha256()
    for clips in splits:
        for each in (clips.video, *clips.labels.values(), clips.episode):
            done.update(each.numpy().tobytes())
    return done.hexdigest()


@pytest.mark.parametrize("game", LABELS)
def test_a_seed_gives_the_same_bytes_again(game, tmp_path):
    sizes = Sizes(3, 2, 2)
    again = [digest(load(game, seed, sizes, tmp_path / name)) for seed, name in [(3, "a"), (3, "b"), (4, "a")]]
    assert again[0] == again[1] != again[2]


def test_a_split_does_not_depend_on_the_sizes_of_the_others(made, tmp_path):
    few = load("boxing", 3, Sizes(2, 1, 12), tmp_path, episode_frames=EPISODE_FRAMES)
    assert torch.equal(few.probe_test.video, made["boxing"].probe_test.video)
    assert torch.equal(few.train.video, made["boxing"].train.video[:2])


def test_the_clips_are_made_once_for_each_setting_and_version(tmp_path, monkeypatch):
    sizes, plays, play = Sizes(2, 1, 1), [], atari._play
    monkeypatch.setattr(atari, "_play", lambda *call: plays.append(call) or play(*call))

    def files_and_plays(*call, episode_frames=16):
        plays.clear()
        load(*call, tmp_path, episode_frames=episode_frames)
        return len(list(tmp_path.iterdir())), len(plays)

    assert files_and_plays("pong", 0, sizes) == (1, 3)
    assert files_and_plays("pong", 0, sizes) == (1, 0)
    assert files_and_plays("pong", 1, sizes) == (2, 3)
    assert files_and_plays("pong", 0, Sizes(1, 1, 1)) == (3, 3)
    assert files_and_plays("pong", 0, sizes, episode_frames=8) == (4, 4)
    monkeypatch.setattr(sys.modules["ale_py"], "__version__", "99")
    assert files_and_plays("pong", 0, sizes) == (5, 3)
    settings = [json.loads(str(np.load(path)["settings"])) for path in tmp_path.iterdir()]
    assert sum(each["ale_py"] == "99" for each in settings) == 1
    assert {each["game"] for each in settings} == {"pong"}


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        load("pong", 0, Sizes(1, 1, 1), tmp_path, episode_frames=8)
    assert list(tmp_path.iterdir()) == []


class Console:
    """Stands in for the emulator: the RAM and the screen hold the number of the frame, the game ends after 27."""

    acts: ClassVar = []
    setInt = setFloat = loadROM = reset_game = setLoggerMode = lambda *_: None

    def getMinimalActionSet(self):
        return list(range(1000))

    def act(self, action):
        self.acts.append(action)

    def game_over(self):
        return len(self.acts) > 27

    def getScreenRGB(self):
        return np.full((210, 160, 3), len(self.acts), np.uint8)

    def getRAM(self):
        return np.full(128, len(self.acts), np.uint8)


def test_actions_are_held_for_six_frames_and_every_fourth_frame_is_kept(monkeypatch):
    monkeypatch.setattr(Console, "acts", [])
    stand_in = SimpleNamespace(
        ALEInterface=Console, LoggerMode=SimpleNamespace(Error=0), roms=SimpleNamespace(get_rom_path=str)
    )
    monkeypatch.setattr(atari, "_import_ale_py", lambda: stand_in)
    frames, ram = atari._play("pong", 0, 0, 100)
    assert ram[:, 0].tolist() == frames[:, 0, 0, 0].tolist() == [4, 8, 12, 16, 20, 24]
    assert [len(list(held)) for _, held in itertools.groupby(Console.acts)] == [6, 6, 6, 6, 4]


def test_two_by_two_pixels_are_averaged():
    screen = torch.randint(256, (210, 160, 3), dtype=torch.uint8)
    kept = screen[18:210].permute(2, 0, 1).double()
    expected = torch.nn.functional.avg_pool2d(kept, 2).add(0.5).floor().permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(atari._half(screen.numpy())).double(), expected)


def test_moved_tokens_hold_a_pixel_that_changed(made):
    video = made["breakout"].train.video[:20]
    change = torch.zeros(20, 8, 96, 80)
    change[:, 1:] = video.float().diff(dim=2).abs().amax(1)
    for patch_size in [(2, 8, 8), (1, 16, 4)]:
        expected = torch.nn.functional.max_pool3d(change, patch_size) > 16
        assert torch.equal(moved(video, patch_size), expected)
    assert 0.001 < expected.float().mean() < 0.2


@pytest.mark.parametrize(("step", "expected"), [(16, False), (17, True), (-17, True)])
def test_a_change_above_the_threshold_moves_one_token(step, expected):
    video = torch.full((1, 3, 8, 96, 80), 100, dtype=torch.uint8)
    video[0, 1, 5:, 20, 30] += step
    tokens = moved(video)
    assert tokens.shape == (1, 4, 12, 10)
    assert tokens.nonzero().tolist() == ([[0, 2, 2, 3]] if expected else [])


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tetris', must be one of pong, boxing, breakout"):
        load("tetris", 0, SIZES, tmp_path)
    for seed, sizes in [(-1, SIZES), (0, Sizes(1, -1, 1))]:
        with pytest.raises(ValueError, match="none may be negative"):
            load("pong", seed, sizes, tmp_path)
    with pytest.raises(ValueError, match="episode_frames is 7, must be at least 8"):
        load("pong", 0, SIZES, tmp_path, episode_frames=7)
    with pytest.raises(ValueError, match="does not divide"):
        moved(torch.zeros(1, 3, 8, 96, 80, dtype=torch.uint8), (3, 8, 8))


def test_a_missing_ale_py_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r'pip install "adamae_sampler\[benchmarks\]"'):
        load("pong", 0, SIZES, tmp_path)
