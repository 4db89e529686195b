"""The tries at other rewards and samplers: rewards against their definitions, samplers against what they promise."""

import copy
import statistics

import pytest
import torch

from adamae_sampler import AdaMAELoss, MotionTokenSampler
from adamae_sampler.estimators import set_log_prob
from benchmarks.masking import arms, clips, objectives, run, samplers, train

SETTING = arms.SETTINGS["smoke"]


@pytest.fixture(scope="module")
def video():
    return clips.FINE.make(8, seed=3).video


def of_arm(name):
    """A model of the smoke size in training, and the loss of an arm."""
    arm = arms.ARMS[name]
    model = train.build(SETTING, 0, dict(arm.model)).train()
    criterion = AdaMAELoss(**run.patches(clips.FINE), **arm.loss)
    return model, arm.objective(model, criterion)


@pytest.mark.parametrize("name", ["standardised", "ranked", "sharpened", "inverted"])
def test_rewards_are_their_definitions(name):
    error = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) + 0.1
    definition = {
        "standardised": lambda e, all_: (e - statistics.mean(all_)) / (statistics.stdev(all_) + 1e-6),
        "ranked": lambda e, all_: sum(other < e for other in all_) / (len(all_) - 1),
        "sharpened": lambda e, _: e * e * e * e,
        "inverted": lambda e, _: 1 / e,
    }[name]
    found = getattr(objectives, name)(error).tolist()
    for row, errors in zip(found, error.tolist(), strict=True):
        assert row == pytest.approx([definition(e, errors) for e in errors], rel=1e-4)


def test_a_reward_reaches_the_sampler_alone(video):
    gradients = {}
    for objective in (objectives.plain, objectives.rewarded(objectives.sharpened)):
        model, _ = of_arm("sharpened")
        torch.manual_seed(1)
        objective(model, AdaMAELoss(**run.patches(clips.FINE)))(video).backward()
        gradients[objective] = {key: each.grad for key, each in model.named_parameters()}
    paper, sharpened = gradients.values()
    for key, mine in sharpened.items():
        same = torch.allclose(mine, paper[key], atol=1e-9, rtol=1e-5)
        if key.startswith(("decoder", "encoder.blocks")):
            assert same, key
        if key == "sampler.network.head.weight":
            assert not same


def test_the_error_times_the_variance_is_that_of_raw_pixels(video, monkeypatch):
    """The prediction in pixels, and the error by the definition."""
    model, loss = of_arm("contrast")
    rewards = []
    monkeypatch.setattr(objectives, "sampling_loss", lambda _, reward: rewards.append(reward) or reward.sum())
    torch.manual_seed(1)
    loss(video)
    torch.manual_seed(1)
    prediction, sample = model(video)
    for clip in range(len(video)):
        shaped = video[clip, 0].double().div(255).unfold(0, 2, 2).unfold(1, 4, 4).unfold(2, 4, 4).reshape(256, 32)
        for place, token in enumerate(sample.masked_idx[clip].tolist()[:20]):
            pixels = shaped[token]
            raw = prediction[clip, place].double() * (pixels.std() + 1e-6) + pixels.mean()
            assert rewards[0][clip, place].item() == pytest.approx((raw - pixels).square().mean().item(), rel=1e-3)


def test_a_seed_fixes_a_given_sampler(video):
    states = [of_arm("sharpened")[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_reducible_error_is_that_of_a_copy_that_lags(video, monkeypatch):
    """Equal weights: nothing to reduce. Then the decoder moves, and the copy's has gone half of the way."""
    monkeypatch.setattr(objectives, "_SLOW", 0.5)
    rewards = []
    monkeypatch.setattr(objectives, "sampling_loss", lambda _, reward: rewards.append(reward) or reward.sum())
    model, loss = of_arm("reducible")
    model.eval()
    loss(video)
    assert not rewards[0].any()

    halfway = copy.deepcopy(model)
    with torch.no_grad():
        model.decoder.head.bias += 1.0
        halfway.decoder.head.bias += 0.5
    torch.manual_seed(1)
    loss(video)
    torch.manual_seed(1)
    _, sample = model(video)
    criterion = AdaMAELoss(**run.patches(clips.FINE))
    errors = [criterion(each(video, mask=sample)[0], video, sample).token_error for each in (halfway, model)]
    gained = (errors[0] - errors[1]).detach()
    expected = (gained - gained.mean(1, keepdim=True)) / gained.std(1, keepdim=True)
    torch.testing.assert_close(rewards[1], expected, rtol=1e-3, atol=1e-3)


def test_a_given_mask_has_the_log_probabilities_of_prior_and_scores(video):
    model, _ = of_arm("motion_prior")
    model.eval()
    torch.nn.init.normal_(model.sampler.network.head.weight)
    drawn = model.draw_mask(video)
    torch.testing.assert_close(model.draw_mask(video, mask=drawn).log_probs, drawn.log_probs)


def test_targets_are_not_shown(video):
    model, _ = of_arm("target_set")
    sample = model.draw_mask(video)
    hidden = sample.log_probs.isneginf()
    assert (hidden.sum(1) == 64).all()
    assert sample.mask[hidden].all()
    assert (hidden.float().mean(0) < 1).all()  # another set for each clip
    assert sample.log_probs.logsumexp(1).abs().max() < 1e-5


def test_the_gradient_of_a_target_set_is_the_policy_gradient_of_its_errors(video):
    model, loss = of_arm("target_set")
    model.eval()
    torch.manual_seed(1)
    loss(video).backward()
    found = model.sampler.network.head.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(1)
    prediction, sample = model(video)
    error = AdaMAELoss(**run.patches(clips.FINE))(prediction, video, sample).token_error.detach()
    whole = torch.zeros(len(video), 256).scatter(1, sample.masked_idx, error)
    mean = torch.stack([row[out.isneginf()].mean() for row, out in zip(whole, sample.log_probs, strict=True)])
    baseline = (mean.sum() - mean) / (len(video) - 1)
    (set_log_prob(sample) * (mean - baseline)).mean().backward()
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, model.sampler.network.head.weight.grad, rtol=1e-3, atol=1e-7)


def test_samplers_start_as_they_say(video):
    even, prior, ramp = (of_arm(name)[0] for name in ("even_start", "motion_prior", "ramp"))
    uniform = torch.full((len(video), 256), 1 / 256).log()
    torch.testing.assert_close(even.draw_mask(video).log_probs, uniform)
    motion = MotionTokenSampler(clips.FINE.grid, 0.9, source="pixels", floor=0.8)
    tokens = prior.sampler_tokens(video)
    torch.testing.assert_close(prior.draw_mask(video).log_probs, motion.log_probs(tokens, video))
    torch.testing.assert_close(ramp.draw_mask(video).log_probs, uniform)
    ramp.draw_mask(video)  # the ramp of 3 steps is at its end
    assert not torch.allclose(ramp.draw_mask(video).log_probs, uniform)


def test_hiding_is_the_inverse_of_showing(video):
    tokens = torch.zeros(len(video), 256, 1)
    shown = samplers.motion(0.8)(SETTING).log_probs(tokens, video).exp()
    hidden = samplers.hiding(0.8)(SETTING)
    inverse = 1 / shown
    found = hidden.log_probs(tokens, video).exp()
    torch.testing.assert_close(found, inverse / inverse.sum(1, keepdim=True))
    moving = clips.FINE.make(8, seed=3).moving
    drawn = ~hidden(tokens.expand(-1, -1, 1), video=video).mask
    assert (drawn & moving).sum() < 0.9 * moving.float().mean() * drawn.sum()
