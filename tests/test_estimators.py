"""The estimators of the sampler's gradient, against an enumeration of every mask that can be drawn."""

import itertools
import math

import pytest
import torch

from adamae_sampler import AdaMAELoss, MaskSample, sampling_loss
from adamae_sampler.estimators import leave_one_out, set_log_prob


def sample_of(log_probs, visible):
    mask = torch.ones(1, len(log_probs), dtype=torch.bool)
    mask[0, list(visible)] = False
    return MaskSample.from_mask(mask, len(visible))._replace(log_probs=log_probs[None])


def probability(p, visible):
    """The probability of the visible set, summed over every order in which it can be drawn."""
    total = 0.0
    for order in itertools.permutations(visible):
        chance, left = 1.0, 1.0
        for token in order:
            chance, left = chance * p[token] / left, left - p[token]
        total = total + chance
    return total


def gradient(of, scores):
    return torch.autograd.grad(of, scores, retain_graph=True)[0]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("tokens", "visible"), [(6, 2), (7, 4), (5, 4), (6, 1)])
def test_the_probability_of_a_set_is_the_sum_over_its_orders(tokens, visible, spread):
    scores = (torch.randn(tokens, dtype=torch.float64) * spread).requires_grad_()
    log_probs = scores.log_softmax(0)
    for chosen in itertools.combinations(range(tokens), visible):
        got = set_log_prob(sample_of(log_probs, chosen))[0]
        wanted = probability(log_probs.exp(), chosen).log()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient(got, scores), gradient(wanted, scores), rtol=0, atol=1e-5)


def test_the_probabilities_of_all_sets_sum_to_one():
    log_probs = (torch.randn(9) * 2).log_softmax(0)
    sets = itertools.combinations(range(9), 4)
    total = sum(float(set_log_prob(sample_of(log_probs, chosen)).exp()) for chosen in sets)
    assert total == pytest.approx(1, abs=1e-5)


def test_full_sized_masks_and_near_certain_tokens_are_accurate_in_fp32():
    scores = torch.randn(2, 1568)
    scores[1, :70] += 200  # almost certain to be visible
    log_probs = scores.log_softmax(1).requires_grad_()
    visible = torch.stack([torch.randperm(1568)[:78].sort().values, torch.arange(78)])
    sample = MaskSample.from_mask(torch.ones(2, 1568, dtype=torch.bool).scatter(1, visible, False), 78)
    found = set_log_prob(sample._replace(log_probs=log_probs))
    torch.testing.assert_close(
        found, set_log_prob(sample._replace(log_probs=log_probs.double())).float(), rtol=1e-4, atol=1e-3
    )
    assert torch.autograd.grad(found.sum(), log_probs)[0].isfinite().all()
    # Clip 1 sees its 70 near-certain tokens anyway, so only the draw of the other 8 from the remaining tokens counts.
    rest = scores[1:, 70:].log_softmax(1)
    eight = MaskSample.from_mask(torch.arange(1498)[None] >= 8, 8)._replace(log_probs=rest)
    torch.testing.assert_close(found[1:], set_log_prob(eight), rtol=1e-4, atol=1e-3)


TOKENS, VISIBLE = 5, 2
SETS = list(itertools.combinations(range(TOKENS), VISIBLE))


@pytest.fixture
def errors():
    """Random errors e_i of the masked tokens, for every mask."""
    torch.manual_seed(3)
    return {chosen: torch.rand(1, TOKENS - VISIBLE, dtype=torch.float64) * 3 for chosen in SETS}


def exact_gradient(scores, errors):
    """The exact gradient of the expected error of a mask."""
    p = scores.softmax(0)
    return gradient(sum(probability(p, chosen) * errors[chosen].mean() for chosen in SETS), scores)


@pytest.mark.parametrize(("estimator", "sign"), [("plackett_luce", 1), ("plackett_luce_max", -1)])
@pytest.mark.parametrize("num_masks", [1, 2])
def test_the_policy_gradient_is_unbiased(estimator, sign, num_masks, errors):
    """Averages over every pair of masks: two masks of one clip, or one mask of each of two clips with the same p."""
    scores = torch.randn(TOKENS, dtype=torch.float64, requires_grad=True)
    log_probs = scores.log_softmax(0)
    expected = torch.zeros_like(scores)
    for pair in itertools.product(SETS, repeat=2):
        samples = [sample_of(log_probs, chosen) for chosen in pair]
        both = MaskSample(*(torch.cat(each) for each in zip(*(sample[:4] for sample in samples), strict=True)))
        error = torch.cat([errors[chosen] for chosen in pair])
        loss = sampling_loss(both, error, estimator=estimator, num_masks=num_masks)
        chance = math.prod(float(probability(log_probs.exp().detach(), chosen)) for chosen in pair)
        expected += chance * gradient(loss, scores)
    torch.testing.assert_close(expected, sign * exact_gradient(scores, errors), rtol=0, atol=1e-5)


def test_with_targets_set_aside_the_policy_gradient_is_that_of_their_expected_error():
    """Token 4 is the target: 2 of the other 4 are drawn, and the error is that of token 4 under each mask."""
    torch.manual_seed(4)
    scores = torch.randn(TOKENS, dtype=torch.float64, requires_grad=True)
    log_probs, target = scores.log_softmax(0), 4
    free = [chosen for chosen in SETS if target not in chosen]
    error = {chosen: torch.rand(1, 1, dtype=torch.float64) * 3 for chosen in free}
    among = scores[:target].softmax(0)
    chance = {chosen: probability(among, chosen) for chosen in free}
    held_out, decoded = torch.arange(TOKENS)[None] == target, torch.tensor([[target]])

    def sample(chosen):
        return sample_of(log_probs, chosen)._replace(held_out=held_out, decoded_idx=decoded)

    for chosen in free:
        torch.testing.assert_close(set_log_prob(sample(chosen))[0], chance[chosen].log(), rtol=0, atol=1e-5)
    expected = torch.zeros_like(scores)
    for pair in itertools.product(free, repeat=2):
        samples = [sample(chosen) for chosen in pair]
        fields = (None if each[0] is None else torch.cat(each) for each in zip(*samples, strict=True))
        both = MaskSample(*fields)
        loss = sampling_loss(both, torch.cat([error[c] for c in pair]), estimator="plackett_luce", num_masks=2)
        expected += float(chance[pair[0]] * chance[pair[1]]) * gradient(loss, scores)
    exact = gradient(sum(chance[chosen] * error[chosen].mean() for chosen in free), scores)
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-5)
    assert exact[target] == 0  # the target's own score has no influence


def test_a_token_that_helps_no_other_is_shown_for_leaving_the_mean_alone():
    """Token 0 is hard, and showing it changes no other error. The policy gradient raises its score, since it leaves
    the mean; with targets set aside it does not."""
    own = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    scores = torch.zeros(TOKENS, dtype=torch.float64, requires_grad=True)
    p = scores.softmax(0)
    over_masked = sum(probability(p, c) * own[[t for t in range(TOKENS) if t not in c]].mean() for c in SETS)
    assert gradient(over_masked, scores)[0] < -0.1  # descent raises the score of token 0
    over_targets = 0.0
    for target in range(1, TOKENS):  # a target is as likely to be any other token
        rest = [t for t in range(TOKENS) if t != target]
        among = scores[rest].softmax(0)
        over_targets += sum(probability(among, c) * own[target] for c in itertools.combinations(range(4), VISIBLE))
    assert gradient(over_targets, scores).abs().max() < 1e-12


def test_the_papers_estimator_makes_p_proportional_to_the_error_that_a_token_has_while_masked(errors):
    """Its expected gradient for a score is p_i sum_j E[m_j e_j] - E[m_i e_i], over the number of masked tokens."""
    scores = torch.randn(TOKENS, dtype=torch.float64, requires_grad=True)
    log_probs = scores.log_softmax(0)
    p = log_probs.exp().detach()
    expected, masked_error = torch.zeros_like(p), torch.zeros_like(p)
    for chosen in SETS:
        chance, sample = float(probability(p, chosen)), sample_of(log_probs, chosen)
        expected += chance * gradient(sampling_loss(sample, errors[chosen]), scores)
        masked_error[sample.masked_idx[0]] += chance * errors[chosen][0]
    wanted = (p * masked_error.sum() - masked_error) / (TOKENS - VISIBLE)
    torch.testing.assert_close(expected, wanted, rtol=0, atol=1e-6)


def test_the_papers_estimator_is_not_the_gradient_of_the_expected_error(errors):
    """Its expectation has another direction, whatever its length and sign. benchmarks/estimator_bias.py measures this."""
    scores = torch.randn(TOKENS, dtype=torch.float64, requires_grad=True)
    log_probs = scores.log_softmax(0)
    expected = torch.zeros_like(scores)
    for chosen in SETS:
        loss = sampling_loss(sample_of(log_probs, chosen), errors[chosen])
        expected += float(probability(log_probs.exp(), chosen)) * gradient(loss, scores)
    cosine = torch.nn.functional.cosine_similarity(expected, exact_gradient(scores, errors), dim=0)
    assert abs(float(cosine)) < 0.98


@pytest.mark.parametrize("decoded", [1, 2])
def test_losses_of_a_part_of_the_masked_tokens_are_unbiased(decoded):
    """Averaged over every part that may be decoded, the losses and gradients equal those of all masked tokens."""
    log_probs = torch.randn(1, TOKENS).log_softmax(1).requires_grad_()
    sample = sample_of(log_probs[0], (1, 3))
    video, prediction = torch.rand(1, 1, 1, 2, 2 * TOKENS), torch.rand(1, TOKENS - VISIBLE, 4)
    criterion = AdaMAELoss(normalize=False, patch_size=2, tubelet_size=1)
    whole = criterion(prediction, video, sample)
    parts = []
    for places in itertools.combinations(range(TOKENS - VISIBLE), decoded):
        part = sample._replace(decoded_idx=sample.masked_idx[:, list(places)])
        parts.append(criterion(prediction[:, list(places)], video, part))
    for name in ("reconstruction", "sampling"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean()
        torch.testing.assert_close(mean, getattr(whole, name))
    gradients = [torch.autograd.grad(part.sampling, log_probs, retain_graph=True)[0] for part in parts]
    wanted = torch.autograd.grad(whole.sampling, log_probs, retain_graph=True)[0]
    torch.testing.assert_close(torch.stack(gradients).mean(0), wanted)


def test_leave_one_out():
    reward = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(reward, 3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]
    assert leave_one_out(torch.tensor([1.0, 3.0]), 1).tolist() == [-2, 2]  # the other clip is the baseline
    assert leave_one_out(torch.tensor([4.0]), 1).tolist() == [4]  # nothing to compare with


def test_invalid_arguments_are_refused():
    sample = sample_of(torch.randn(5).log_softmax(0), (1, 3))
    with pytest.raises(ValueError, match=r"estimator='pl', expected one of 'categorical', 'plackett_luce'"):
        AdaMAELoss(estimator="pl")
    with pytest.raises(ValueError, match=r"estimator='pl'"):
        sampling_loss(sample, torch.rand(1, 3), estimator="pl")
    with pytest.raises(ValueError, match="no distribution to learn"):
        set_log_prob(sample._replace(log_probs=None))
    with pytest.raises(ValueError, match=r"takes no decode_mask"):
        AdaMAELoss(estimator="plackett_luce", patch_size=2, tubelet_size=1)(
            torch.rand(1, 4, 12), torch.rand(1, 3, 1, 2, 10), sample, torch.tensor([[False, True, False, False, False]])
        )
