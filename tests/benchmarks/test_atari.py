"""Clips of Atari games: labels against pixels, splits, seeds and the cache."""

import dataclasses
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

from benchmarks.masking import arms, atari, readout, run
from benchmarks.masking.atari import ABSENT, LABELS, TARGETS, GameClips, game, load

NUMBER = 100
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

CASES = [(name, label) for name, labels in LABELS.items() for label in labels]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atari")
    return {name: load(game(name), NUMBER, 3, folder, episode_frames=EPISODE_FRAMES) for name in LABELS}


def label_of(clips, name):
    """[n, 8]"""
    return clips.labels[:, list(LABELS[clips.cut.name]).index(name)]


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


@pytest.mark.parametrize(("name", "label"), CASES)
def test_a_label_is_the_place_of_its_object_in_the_pixels(name, label, made):
    clips, (item, axis) = made[name], label.split("_")
    covered = coverage(clips.video, name, item)
    weights = covered.sum({"x": 1, "y": 2}[axis])
    first = OBJECTS[name, item][2]["yx".index(axis)].start  # of the pixels that were searched
    place = (weights * (torch.arange(weights.shape[1]) + 0.5)).sum(1) / weights.sum(1) + first
    value = label_of(clips, label).flatten()
    chosen = shown_whole(covered, name, item) & (value != ABSENT)
    assert chosen.sum() > 200
    x, y = value[chosen].double().numpy(), place[chosen].double().numpy()
    assert np.corrcoef(x, y)[0, 1] > 0.98
    assert np.polyfit(x, y, 1)[0] == pytest.approx(0.5, rel=0.01), "a step in the RAM is a pixel of the whole screen"
    if item == TARGETS[name].name:
        origin = {"x": TARGETS[name].origin_x, "y": TARGETS[name].origin_y}[axis]
        assert np.abs((x - origin) / 2 - y).mean() < 0.5  # pixels


@pytest.mark.parametrize("name", ["pong", "breakout"])
def test_tokens_of_the_target_hold_its_pixels(name, made):
    clips, item = made[name], TARGETS[name].name
    covered = coverage(clips.video, name, item)  # [frames, rows, columns] of the searched part
    rows, columns = OBJECTS[name, item][2]
    whole = torch.zeros(len(covered), 96, 80)
    whole[:, rows, columns] = covered
    whole = whole.view(-1, 4, 2, 12, 8, 10, 8).sum((2, 4, 6)).flatten(1)  # [n, N]
    seen = whole[clips.moving] > 0.1
    assert seen.float().mean() > (0.99 if name == "pong" else 0.7)  # bricks hide Breakout's ball
    assert whole[clips.moving].sum() / whole.sum() > 0.85  # the rest lies across the edge of a token
    assert 4 * 0.4 < clips.moving.sum(1).float().mean() < 4 * 2


@pytest.mark.parametrize(("name", "item"), [("pong", "ball"), ("pong", "enemy"), ("breakout", "ball")])
def test_a_label_is_absent_where_the_screen_does_not_show_the_object(name, item, made):
    clips = made[name]
    seen = coverage(clips.video, name, item).sum((1, 2)) > 0.1
    value = label_of(clips, f"{item}_y").flatten()
    absent = value == ABSENT
    assert 0.02 < absent.float().mean() < 0.5
    assert not (seen & absent).any()
    if name == "breakout":  # elsewhere bricks or the paddle hide the ball
        in_the_open = ((value > 88) & (value < 170)) | (value > 181)
        assert (value > 181).any()
        seen, absent = seen[in_the_open], absent[in_the_open]
    assert (seen | absent).float().mean() > 0.99
    for label in LABELS[name]:
        if label.startswith(item):
            assert torch.equal(label_of(clips, label) == ABSENT, label_of(clips, f"{item}_y") == ABSENT)


@pytest.mark.parametrize("name", LABELS)
def test_shapes_and_types(name, made):
    clips = made[name]
    assert isinstance(clips, GameClips)
    assert (clips.video.shape, clips.video.dtype) == ((NUMBER, 3, 8, 96, 80), torch.uint8)
    assert (clips.labels.shape, clips.labels.dtype) == ((NUMBER, len(LABELS[name]), 8), torch.int16)
    assert (clips.episode.shape, clips.episode.dtype) == ((NUMBER,), torch.int32)
    assert clips.moving.shape == (NUMBER, 480)
    assert len(torch.unique(clips.episode)) > 1
    assert torch.unique(clips.episode, return_counts=True)[1].max() <= EPISODE_FRAMES // 8


def digest(clips):
    done = hashlib.sha256()
    for each in (clips.video, clips.labels, clips.episode):
        done.update(each.numpy().tobytes())
    return done.hexdigest()


@pytest.mark.parametrize("name", LABELS)
def test_a_seed_gives_the_same_bytes_again(name, tmp_path):
    calls = [(3, "a"), (3, "b"), (4, "a")]
    again = [digest(load(game(name), 3, seed, tmp_path / folder)) for seed, folder in calls]
    assert again[0] == again[1] != again[2]


def test_fewer_clips_are_the_first_of_more(made, tmp_path):
    few = load(game("boxing"), 12, 3, tmp_path, episode_frames=EPISODE_FRAMES)
    assert torch.equal(few.video, made["boxing"].video[:12])


def test_the_clips_are_made_once_for_each_setting_and_version(tmp_path, monkeypatch):
    plays, play = [], atari._play
    monkeypatch.setattr(atari, "_play", lambda *call: plays.append(call) or play(*call))

    def files_and_plays(name, number, seed, episode_frames=16):
        plays.clear()
        load(game(name), number, seed, tmp_path, episode_frames=episode_frames)
        return len(list(tmp_path.iterdir())), len(plays)

    assert files_and_plays("pong", 2, 0) == (1, 1)
    assert files_and_plays("pong", 2, 0) == (1, 0)
    assert files_and_plays("pong", 2, 1) == (2, 1)
    assert files_and_plays("pong", 1, 0) == (3, 1)
    assert files_and_plays("pong", 2, 0, episode_frames=8) == (4, 2)
    monkeypatch.setattr(sys.modules["ale_py"], "__version__", "99")
    assert files_and_plays("pong", 2, 0) == (5, 1)
    settings = [json.loads(str(np.load(path)["settings"])) for path in tmp_path.iterdir()]
    assert sum(each["ale_py"] == "99" for each in settings) == 1
    assert {each["game"] for each in settings} == {"pong"}


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        load(game("pong"), 1, 0, tmp_path, episode_frames=8)
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


@pytest.mark.parametrize("arm", ["random", "exact", "motion"])
def test_an_arm_runs_on_a_game(arm, made, monkeypatch):
    setting = dataclasses.replace(arms.SETTINGS["smoke"], cut=game("pong"))
    monkeypatch.setitem(arms.SETTINGS, "pong", setting)
    fit, read_out, scored = made["pong"].first(40), run.read_out, []
    monkeypatch.setattr(run, "clips", lambda number, seed, cut, device: fit if seed == run._FIT_SEED else made["pong"])
    monkeypatch.setattr(run, "read_out", lambda *given: scored.append(given[-1]) or read_out(*given))
    (row,) = run.run(run.Task(arm, 0, "pong", 2, 1e-3, 0.9, True), "abc", torch.device("cpu"))
    assert row.mover == run.ALL
    assert 0.5 < row.moving < 1
    assert row.shape is row.error_still is None
    new = [place for place, video in enumerate(made["pong"].video) if not (fit.video == video).flatten(1).all(1).any()]
    assert 40 < len(new) < 61
    for name in ("video", "moving", "labels", "episode"):
        assert torch.equal(getattr(scored[0], name), getattr(made["pong"], name)[new])
    assert row.visible_moving == pytest.approx(
        made["pong"].moving.float().mean().item(), rel=9 if arm == "motion" else 1
    )


def test_the_readout_of_a_game_finds_what_the_features_say(made):
    clips = made["pong"]
    order = {clip.numpy().tobytes(): place for place, clip in enumerate(clips.video)}

    def labels(video):
        here = [order[clip.numpy().tobytes()] for clip in video]
        places = clips.labels[here][:, :, 1::2].transpose(1, 2).float()  # [B, 4, labels]
        return torch.cat([clips.moving[here].float()[..., None], places.repeat_interleave(120, 1)], 2)

    found = readout.read_out(labels, clips, clips)
    assert found.moving == [1.0]
    assert found.position[0] > 0.99
    assert found.shape is None


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tetris', must be one of pong, boxing, breakout"):
        load(game("tetris"), 1, 0, tmp_path)
    for number, seed in [(1, -1), (-1, 0)]:
        with pytest.raises(ValueError, match="none may be negative"):
            load(game("pong"), number, seed, tmp_path)
    with pytest.raises(ValueError, match="episode_frames is 7, must be at least 8"):
        load(game("pong"), 1, 0, tmp_path, episode_frames=7)


def test_a_missing_ale_py_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r'pip install "adamae_sampler\[benchmarks\]"'):
        load(game("pong"), 1, 0, tmp_path)
