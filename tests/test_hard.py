"""Hard masks: the hidden set, the ramp, the ranking loss, and a model that learns what is hard."""

import itertools
import math
from unittest import mock

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch.nn.functional import logsigmoid

from adamae_sampler import AdaMAELoss, AdaptiveTokenSampler, HardTokenSampler, MaskSample, Ramp, ranking_loss

GRID = (2, 3, 5)


class FirstFeature(nn.Module):
    """The predicted error of a token is its first feature."""

    def forward(self, tokens):
        return tokens[..., 0] * 1.0


def sampler_at(step, **options):
    sampler = HardTokenSampler(4, GRID, 0.5, network=FirstFeature(), **{"ramp_steps": 10, **options})
    sampler.share.set(step, 10)
    return sampler


@pytest.mark.parametrize(("step", "hard"), [(0, 0), (1, 0), (2, 1), (5, 3), (10, 7), (99, 7)])
def test_the_hardest_tokens_are_hidden_and_the_rest_is_uniform(step, hard):
    sampler = sampler_at(step).eval()
    one = torch.randn(1, 30, 4)
    order = one[0, :, 0].argsort(descending=True).tolist()
    assert hard == math.floor(0.5 * min(step / 10, 1) * 15 + 1e-9)
    sample = sampler(one.expand(20_000, -1, -1))
    hidden = sample.mask.double().mean(0)
    assert (hidden[order[:hard]] == 1).all()
    share = (15 - hard) / (30 - hard)
    assert (hidden[order[hard:]] - share).abs().max() < 5 * (share * (1 - share) / 20_000) ** 0.5
    pairs = (~sample.mask).double()
    both = (pairs.T @ pairs / 20_000)[order[hard:]][:, order[hard:]]
    expected = 15 * 14 / (30 - hard) / (29 - hard)
    off = ~torch.eye(30 - hard, dtype=torch.bool)
    assert (both[off] - expected).abs().max() < 5 * (expected * (1 - expected) / 20_000) ** 0.5
    assert sample.num_nonfinite.sum() == 0
    torch.testing.assert_close(sample.difficulty[0], one[0, :, 0])


def test_equal_predictions_are_hidden_at_random():
    hidden = sampler_at(10)(torch.zeros(20_000, 30, 4)).mask.double()
    assert (hidden.mean(0) - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5
    tokens = torch.zeros(20_000, 30, 4)
    tokens[:, :5, 0], tokens[:, 5:7, 0] = -1.0, 1.0  # seven are hidden for certain: two, and five of the equal ones
    hidden = sampler_at(10)(tokens).mask.double()
    assert (hidden[:, 5:7] == 1).all()
    share = 5 / 23 + 18 / 23 * 8 / 23
    assert (hidden[:, 7:].mean(0) - share).abs().max() < 5 * (share * (1 - share) / 20_000) ** 0.5


def explorer():
    sampler = AdaptiveTokenSampler(4, GRID, 0.5, network=FirstFeature(), exploration=Ramp(1.0, 0.0, 10))
    return sampler, sampler.exploration


@pytest.mark.parametrize("made", [lambda: (hard := sampler_at(0), hard.share), explorer])
def test_the_ramp_counts_draws_in_training_alone(made):
    (sampler, ramp), tokens = made(), torch.randn(1, 30, 4)
    sampler.train()
    for expected in range(3):
        assert ramp.step == expected
        sampler(tokens)
    mask = sampler.eval()(tokens).mask
    sampler.train()
    sampler(tokens, mask=mask)  # nothing is drawn
    assert ramp.step == 3


def test_a_ramp_goes_on_from_the_state_dict():
    ramp = Ramp(1.0, 0.0, 4)
    values = [float(ramp()) for _ in range(6)]
    assert values == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert ramp.state_dict() == {"step": torch.tensor(6), "num_steps": torch.tensor(4)}
    ramp = Ramp(1.0, 0.0, 4)
    first = [float(ramp()) for _ in range(2)]
    resumed = Ramp(1.0, 0.0, 100)
    resumed.load_state_dict(ramp.state_dict())
    assert resumed.eval()() == 0.5
    assert first + [float(resumed.train()()) for _ in range(4)] == values
    assert resumed().shape == ()
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match=rf"num_steps={bad}, expected a whole number of calls"):
            Ramp(0.0, 1.0, bad)
        with pytest.raises(ValueError, match=rf"num_steps={bad}, expected a whole number of calls"):
            ramp.set(1, bad)
    with pytest.raises(ValueError, match="step=-1, expected a whole number of calls, 0 or more"):
        ramp.set(-1, 4)
    assert ramp.value() == ramp.value() == 0.5  # neither counted nor set by what failed


def test_exploration_may_follow_a_ramp():
    sampler = AdaptiveTokenSampler(4, GRID, 0.5, network=FirstFeature(), exploration=Ramp(1.0, 0.0, 2))
    tokens = torch.randn(2, 30, 4, requires_grad=True)
    softmax = tokens[..., 0].softmax(1)
    for exploration in (1.0, 0.5, 0.0, 0.0):
        log_probs = sampler(tokens).log_probs
        torch.testing.assert_close(log_probs.exp(), (1 - exploration) * softmax + exploration / 30)
        (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), tokens)
        assert gradient.isfinite().all()
        assert bool(gradient.any()) == (exploration < 1)
    assert "exploration.step" in sampler.state_dict()
    tokens.data[0, 5] = -torch.inf  # drawn last, at the end of the ramp too
    (gradient,) = torch.autograd.grad(sampler(tokens).log_probs[:, 0].sum(), tokens)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="expected a ramp between shares of p"):
        AdaptiveTokenSampler(8, GRID, exploration=Ramp(1.5, 0.1, 10))


def test_several_masks_share_the_hard_tokens():
    sampler = sampler_at(10, num_masks=3)
    tokens = torch.randn(2, 30, 4)
    sample = sampler(tokens)
    assert sample.difficulty.shape == sample.mask.shape == (6, 30)
    hardest = tokens[..., 0].topk(7).indices.repeat_interleave(3, 0)
    assert sample.mask.gather(1, hardest).all()
    assert not torch.equal(sample.mask[0], sample.mask[1])
    assert torch.equal(sampler(tokens, mask=sample).difficulty, sample.difficulty)
    other = AdaptiveTokenSampler(4, GRID, 0.5, network=FirstFeature(), num_masks=3)
    assert other(tokens, mask=sample).difficulty is None  # another sampler's mask leaves no loss to rank


def test_predictions_that_are_not_finite_are_counted():
    tokens = torch.zeros(1, 30, 4)
    tokens[0, 3, 0], tokens[0, 9, 0] = torch.nan, torch.inf
    sample = sampler_at(10)(tokens)
    assert sample.num_nonfinite.tolist() == [2]
    assert sample.mask[0, [3, 9]].all()
    assert sample.mask.sum() == 15


def ranking_by_loop(difficulty, error):
    """The mean over ordered pairs of different tokens."""
    total, pairs = 0.0, 0
    for i, j in itertools.permutations(range(len(error)), 2):
        pairs += 1
        if error[i] > error[j]:
            total -= logsigmoid(difficulty[i] - difficulty[j])
        elif error[i] < error[j]:
            total -= logsigmoid(difficulty[j] - difficulty[i])
    return total / pairs


def a_sample(clips=2):
    sampler = sampler_at(0)
    sample = sampler(torch.randn(clips, 30, 4))
    return sample._replace(difficulty=sample.difficulty.requires_grad_()), torch.rand(clips, 15).mul(
        9
    ).round()  # some equal


def test_the_ranking_loss_is_a_mean_over_pairs():
    sample, error = a_sample()
    difficulty = sample.difficulty.gather(1, sample.masked_idx)
    expected = sum(ranking_by_loop(d, e) for d, e in zip(difficulty, error, strict=True)) / 2
    with mock.patch("torch.randint", return_value=torch.arange(1, 15)[:, None]):  # every shift once
        torch.testing.assert_close(ranking_loss(sample, error), expected)
    drawn = torch.stack([ranking_loss(sample, error).detach() for _ in range(400)])
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / 20
    assert drawn.std() > 0


def test_the_ranking_loss_raises_the_predictions_of_large_errors():
    sample, _ = a_sample()
    error = torch.arange(15.0).expand(2, 15).clone().requires_grad_()
    ranking_loss(sample, error).backward()
    gradient = sample.difficulty.grad.gather(1, sample.masked_idx)
    assert error.grad is None
    assert (gradient[:, -1] < 0).all()
    assert (gradient[:, 0] > 0).all()
    assert not sample.difficulty.grad.gather(1, sample.visible_idx).any()
    same = ranking_loss(sample, torch.ones(2, 15))
    assert same == 0


def test_the_ranking_loss_of_a_part():
    """Of the decoded tokens alone, and without tokens of unknown error."""
    sample, error = a_sample()
    decoded = sample._replace(decoded_idx=sample.masked_idx[:, :8])
    unknown = error.clone()
    unknown[:, 8:] = torch.nan
    with mock.patch("torch.randint", return_value=torch.arange(1, 8)[:, None]):
        part = ranking_loss(decoded, error[:, :8])
    with mock.patch("torch.randint", return_value=torch.arange(1, 15)[:, None]):
        torch.testing.assert_close(ranking_loss(sample, unknown), part)
    one = ranking_loss(sample._replace(decoded_idx=sample.masked_idx[:, :1]), error[:, :1])
    one.backward()
    assert one == 0
    assert ranking_loss(sample, torch.full((2, 15), torch.nan)) == 0
    with pytest.raises(ValueError, match=r"error has shape \(2, 14\), expected \(2, 15\)"):
        ranking_loss(sample, error[:, :14])
    with pytest.raises(ValueError, match=r"predicts no errors to rank. Use HardTokenSampler"):
        ranking_loss(sample._replace(difficulty=None), error)


def test_the_loss_module_ranks_instead_of_sampling():
    sample, _ = a_sample()
    video, prediction = torch.rand(2, 3, 4, 6, 20), torch.zeros(2, 15, 48)
    criterion = AdaMAELoss(0.5, patch_size=(2, 4))
    torch.manual_seed(0)
    out = criterion(prediction, video, sample)
    torch.manual_seed(0)
    torch.testing.assert_close(out.sampling, ranking_loss(sample, out.token_error))
    torch.testing.assert_close(out.loss, out.reconstruction + 0.5 * out.sampling)


def test_the_loss_module_ranks_the_masked_of_the_decoded_tokens():
    sample, _ = a_sample()
    video, decode_mask = torch.rand(2, 3, 4, 6, 20), torch.arange(30).expand(2, 30) % 3 > 0  # 10 tokens are decoded
    out = AdaMAELoss(patch_size=(2, 4))(torch.zeros(2, 10, 48), video, sample, decode_mask)
    out.sampling.backward()
    gradient = sample.difficulty.grad
    assert not gradient[~sample.mask].any()
    assert not gradient[decode_mask].any()
    assert gradient[sample.mask & ~decode_mask].any()


def test_a_model_learns_which_token_is_hard():
    model = tiny_model(masking="hard", score_network="mlp", mask_ratio=0.5).train()
    model.encoder.patch_embed.requires_grad_(False)  # so that the tokens change by no other loss
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    criterion = AdaMAELoss(1.0, patch_size=8)
    noisy = 16 + 4 + 2  # the token at (1, 1, 2) of 4 x 4 x 4
    for step in range(40):
        video = torch.full((4, 3, 8, 32, 32), 0.5)
        video[:, :, 2:4, 8:16, 16:24] = 3 * torch.rand(4, 3, 2, 8, 8)
        if step == 0:  # start with the noisy token as the easiest
            difficulty = model.draw_mask(video, mask=torch.arange(64).expand(4, 64) % 2 > 0).difficulty
            sign = torch.sign(difficulty[0, 0] - difficulty[0, noisy])
            model.sampler.network.head.weight.data *= sign
        prediction, sample = model(video)
        out = criterion(prediction, video, sample)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    second, first = sample.difficulty.sort(1).values[:, -2:].unbind(1)
    assert sample.difficulty.argmax(1).tolist() == [noisy] * 4
    assert (first - second > 2).all()
    assert model.sampler.share.step == 40


@pytest.mark.parametrize("num_masks", [1, 2])
def test_a_hard_draw_and_its_loss_compile_as_one_graph(num_masks):
    sampler = HardTokenSampler(16, (4, 3, 5), 0.75, network="mlp", num_masks=num_masks, ramp_steps=2).train()

    def step(tokens):
        sample = sampler(tokens)
        return ranking_loss(sample, sample.masked_idx.float()), sample

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (1, 2, 3):
        loss, sample = compiled(torch.randn(2, 60, 16))
        loss.backward()
        assert sampler.share.step == count
    hardest = sample.difficulty.topk(22).indices
    assert sample.mask.gather(1, hardest).all()
    assert isinstance(sample, MaskSample)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("hard_share=1.5, expected a share of the masked tokens", {"hard_share": 1.5}),
        ("ramp_steps=0, expected", {"ramp_steps": 0}),
        ("score network 'cnn', expected", {"network": "cnn"}),
    ],
)
def test_bad_arguments(message, options):
    with pytest.raises(ValueError, match=message):
        HardTokenSampler(16, GRID, **options)
