"""Parts of a run of benchmarks/strategies.py: clips with known truth, readouts, training, measures of masks."""

import dataclasses
import itertools
import math
import statistics as standard

import pytest
import torch
from scipy import stats

from adamae_sampler import AdaMAELoss, MaskSample
from benchmarks.masking import arms, clips, objectives, readout, run, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def generated():
    return clips.FINE.make(64, seed=3)


def tokens_of(pixels):
    """[n, T, H, W] -> [n, N, pixels of a token], by slices."""
    found = []
    for t, y, x in itertools.product(*map(range, clips.FINE.grid)):
        t, y, x = t * clips.FINE.tubelet, y * clips.FINE.patch, x * clips.FINE.patch
        found.append(
            pixels[:, t : t + clips.FINE.tubelet, y : y + clips.FINE.patch, x : x + clips.FINE.patch].flatten(1)
        )
    return torch.stack(found, 1)


def test_clips_depend_on_the_arguments_alone(generated):
    again = clips.FINE.make(64, seed=3)
    for name, value in vars(generated).items():
        same = getattr(again, name)
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert not torch.equal(clips.FINE.make(64, seed=4).video, generated.video)


@pytest.mark.parametrize("scene", [clips.FINE, clips.COARSE])
def test_a_scene_is_cut_into_its_tokens(scene):
    made = scene.make(200, seed=3)
    assert made.video.shape == (200, 1, scene.frames, scene.height, scene.height)
    assert made.moving.shape == (200, math.prod(scene.grid))
    assert set(made.size.tolist()) == set(range(len(scene.sizes)))
    change = (made.video[:, 0].int().diff(dim=1) != 0).any(1).float()  # [n, side, side]
    places = torch.nn.functional.max_pool2d(change[:, None], scene.patch)[:, 0].bool()
    moving = made.moving.view(200, *scene.grid).any(1)
    assert (places & moving).sum() / moving.sum() > 0.98
    assert len(made.first(7)) == len(made.first(7).size) == 7
    assert [len(each) for each in made.by_size()] == [200] * (1 + len(scene.sizes))


def test_only_what_moves_changes(generated):
    """The labels against the pixels: what changes from frame to frame is the mover, and all of it moves."""
    video = generated.video[:, 0].int()
    change = torch.zeros_like(video, dtype=torch.bool)
    change[:, 1:] |= video[:, 1:] != video[:, :-1]
    change[:, :-1] |= video[:, 1:] != video[:, :-1]
    share = tokens_of(change).float().mean(2)
    assert (share[generated.moving] > 0).float().mean() > 0.98
    near = torch.nn.functional.max_pool3d(
        generated.moving.view(-1, 1, *clips.FINE.grid).float(), 3, stride=1, padding=1
    ).flatten(1)
    assert (share[near == 0] == 0).all()  # a still object, or the background
    assert not (generated.moving & generated.still).any()
    assert generated.still.any()


def test_places_and_velocities_are_those_of_the_pixels():
    made = dataclasses.replace(clips.FINE, sizes=(4,)).make(64, seed=5)
    video = made.video[:, 0].float()
    change = (video[:, 1:] - video[:, :-1]).abs()  # at the edges of the mover, on both of its sides
    pixel = torch.arange(clips.FINE.height) + 0.5
    weight = change.sum((1, 2, 3))
    centre = (
        torch.stack([(change.sum((1, 3)) * pixel).sum(1), (change.sum((1, 2)) * pixel).sum(1)], 1) / weight[:, None]
    )
    path = made.position.mean(1)
    assert ((centre - path).norm(dim=1) < 2).float().mean() > 0.9
    moved = made.position.diff(dim=1) / clips.FINE.tubelet
    straight = ~made.turns
    torch.testing.assert_close(moved[straight], made.velocity[straight, 1:], atol=1e-4, rtol=0)
    assert (made.velocity[made.turns].diff(dim=1).abs().sum((1, 2)) > 0.1).all()
    assert made.position.amin() > 0
    assert made.position.amax() < clips.FINE.height


def test_still_objects_look_like_what_moves(generated):
    """Pixels of movers and of still objects have the same mean and deviation, so that only motion tells them apart."""
    made = clips.FINE.make(600, seed=6)
    pixels = tokens_of(made.video[:, 0].float() / 255)
    moving, still = (pixels[each].flatten() for each in (made.moving, made.still))
    assert abs(moving.mean() - still.mean()) < 0.03
    assert abs(moving.std() - still.std()) < 0.03


def test_textures_fall_with_frequency():
    made = clips.textures(torch.Generator().manual_seed(0))
    power = torch.fft.fft2(made).abs().square().mean(0)
    ratio = (power[0, 4] + power[4, 0]) / (power[0, 16] + power[16, 0])
    assert math.log(ratio) / math.log(4) == pytest.approx(2 * clips._SLOPE, abs=0.3)


def test_auc_and_rank_correlation_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(6, (60,), generator=generator).double()
    positive = torch.rand(60, generator=generator) < 0.3
    pairs = [(one > other) + 0.5 * (one == other) for one in score[positive] for other in score[~positive]]
    assert readout.auc(score, positive) == pytest.approx(float(sum(pairs)) / len(pairs))
    other = torch.randint(5, (60, 2), generator=generator).double()
    expected = standard.mean(stats.spearmanr(score, other[:, k]).statistic for k in range(2))
    assert readout.rank_correlation(torch.stack([score, score], 1), other) == pytest.approx(expected)


def test_the_readout_finds_what_the_features_say_and_nothing_else(generated):
    """Features that hold the labels, and features of noise."""
    order = {clip.numpy().tobytes(): place for place, clip in enumerate(generated.video)}

    def labels(video):
        here = [order[clip.numpy().tobytes()] for clip in video]
        moving, still = generated.moving[here].float(), generated.still[here].float()
        velocity = generated.velocity[here].repeat_interleave(clips.FINE.grid[1] * clips.FINE.grid[2], 1)
        return torch.cat([moving[..., None], (moving - still)[..., None], velocity], 2)

    found = readout.read_out(labels, generated, generated)
    assert found.moving == [1.0] * 6
    assert found.moving_object == [1.0] * 6
    assert min(found.velocity) > 0.99
    assert min(found.direction) > 0.4  # chance is 0.125
    noise = torch.Generator().manual_seed(0)
    found = readout.read_out(lambda video: torch.randn(len(video), 256, 4, generator=noise), generated, generated)
    assert found.moving[0] == pytest.approx(0.5, abs=0.05)


def test_ridge_is_least_squares_for_a_small_penalty(monkeypatch):
    monkeypatch.setattr(readout, "_RIDGE", 0.0)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(50, 3, generator=generator).double(), torch.randn(50, 2, generator=generator).double()
    fit = readout._Ridge()
    fit.add(inputs[:20], targets[:20])
    fit.add(inputs[20:], targets[20:])
    with_one = torch.cat([inputs, torch.ones(50, 1)], 1)
    torch.testing.assert_close(fit.solve(), torch.linalg.lstsq(with_one, targets).solution)


def test_a_seed_fixes_encoder_and_decoder_whatever_the_arm():
    setting = arms.SETTINGS["smoke"]
    states = []
    for name in ("random", "exact", "motion", "fast"):
        state = train.build(setting, 5, dict(arms.ARMS[name].model)).state_dict()
        states.append({key: value for key, value in state.items() if not key.startswith("sampler.")})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[key], states[0][key]) for key in other)


def test_the_initial_weights_of_a_seed_are_those_of_the_committed_rows():
    """Numbers of the commit that the question was fixed in. With other weights new rows would not pair with old ones."""
    model = train.build(arms.SETTINGS["cpu"], 3, dict(arms.ARMS["random"].model))
    found = [*model.encoder_to_decoder.weight[0, :3], *model.decoder.head.weight[0, :2], *model.mask_token[0, 0, :2]]
    wanted = [0.03219800, 0.02116837, -0.02753952, -0.14016384, 0.04617238, -0.00502725, -0.00042615]
    torch.testing.assert_close(torch.stack(found).detach(), torch.tensor(wanted), rtol=1e-5, atol=1e-7)


def test_the_table_of_places_tells_time_row_and_column_apart():
    table = train.place_table((4, 8, 8), 96)[0].view(4, 8, 8, 96)
    alike = (table @ table[1, 3, 5]).flatten()
    assert alike.argmax() == 1 * 64 + 3 * 8 + 5
    near = [table[t, 3, 5] @ table[1, 3, 5] for t in (0, 2)]
    assert min(near) > max(table[1, 2, 5] @ table[1, 3, 5], table[1, 3, 4] @ table[1, 3, 5])


def test_training_is_deterministic_and_has_the_rate_of_its_schedule():
    setting = dataclasses.replace(arms.SETTINGS["smoke"], steps=6)
    rates = [train.learning_rate(dataclasses.replace(setting, steps=100), done) for done in range(100)]
    assert rates[9] == max(rates) == setting.lr
    assert rates[0] == pytest.approx(setting.lr / 10)
    assert rates[99] < setting.lr / 1000
    weights, criterion = [], AdaMAELoss(patch_size=clips.FINE.patch)
    for _ in range(2):
        model = train.build(setting, 0, {"masking": "adaptive"})
        before = model.encoder.patch_embed.proj.weight.clone()
        steps = train.pretrain(model, objectives.plain(model, criterion), run.clips(8, 1, clips.FINE, CPU), setting, 0)
        assert list(steps) == [1, 2, 3, 4, 5, 6]
        weights.append(model.encoder.patch_embed.proj.weight)
    assert torch.equal(*weights)
    assert not torch.equal(before, weights[0])


def test_fine_tuning_learns_from_few_labels_and_leaves_the_model_alone():
    setting = dataclasses.replace(arms.SETTINGS["smoke"], few=16, few_steps=150, few_lr=5e-3)
    model, made = train.build(setting, 0, {"masking": "random"}).eval(), run.clips(16, 1, clips.FINE, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = run.few_labels(model, made, made, setting, 0)
    assert found[0] > 0.75
    assert run.few_labels(model, made, made, setting, 0) == found
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_measured_shares_and_errors_are_of_the_masks(generated):
    """A sampler that shows the mover alone, and errors against a loop."""
    setting = arms.SETTINGS["smoke"]
    model = train.build(setting, 0, {"masking": "random"})
    found = run.measure(model, generated, normalize=True)
    assert found["visible_moving"][0] == pytest.approx(generated.moving.float().mean().item(), abs=0.03)
    shown = generated.moving.int().argsort(1, descending=True)[:, :5].sort(1)[0]

    def draw_mask(video):
        mask = torch.ones(len(video), 256, dtype=torch.bool).scatter(1, shown[: len(video)], False)
        return MaskSample.from_mask(mask, 5)

    model.draw_mask = draw_mask
    again = run.measure(model, generated, normalize=True)
    assert again["visible_moving"][0] > 0.95
    assert again["error_moving"] == found["error_moving"]  # of the same random masks, whatever the arm shows
    assert len(found["error_still"]) == 6
