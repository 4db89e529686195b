"""Tokens that do not count: samplers, losses and the reference model."""

import pytest
import torch
from conftest import tiny_model
from test_options import GRID, step

from adamae_sampler import (
    AdaMAELoss,
    AdaptiveTokenSampler,
    HardTokenSampler,
    MaskSample,
    RandomTokenSampler,
    ranking_loss,
    reconstruction_error,
    sampling_loss,
)
from adamae_sampler.estimators import set_log_prob
from adamae_sampler.losses import HeadInputs
from adamae_sampler.mask import check_valid
from adamae_sampler.ops import patchify
from adamae_sampler.sampler import MASKINGS, ScoredTokenSampler, TokenSampler, draw_decoded, draw_valid

NUM_TOKENS = 64


def some_valid(masking, clips=3):
    """Whole positions and time steps for the masks that need them, else random tokens."""
    valid = torch.ones(clips, *GRID, dtype=torch.bool)
    if masking == "tube":
        valid[1, :, 2:, 1:] = False
        valid[2, 3:, 0, 0] = False  # not whole: hidden, and what is valid of it counts
    elif masking == "frame":
        valid[1, :2] = False
    else:
        valid[1:] = torch.rand(clips - 1, *GRID) < 0.5
        valid[1, :, 0] = True
    return valid.flatten(1)


def make(masking, **options):
    kind = MASKINGS[masking]
    if issubclass(kind, ScoredTokenSampler):
        sampler = kind(8, GRID, 0.75, network="mha", **options)
        if masking == "hard":
            sampler.share.set(5, 10)
        return sampler
    return kind(GRID, 0.75, **options)


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("masking", MASKINGS)
def test_an_invalid_token_is_never_drawn(masking, masks):
    sampler, valid = make(masking, num_masks=masks).eval(), some_valid(masking)
    tokens = torch.randn(3, NUM_TOKENS, 8)
    shown = torch.zeros(3, NUM_TOKENS)
    for _ in range(60):
        sample = sampler(tokens, valid=valid)
        assert sample.visible_idx.shape == (3 * masks, sampler.num_visible)
        assert torch.equal(sample.valid, valid.repeat_interleave(masks, 0))
        assert sample.mask.sum(1).unique().tolist() == [NUM_TOKENS - sampler.num_visible]
        shown += (~sample.mask).view(3, masks, -1).sum(1)
    assert not shown[~valid].any()
    if masking in ("random", "grid", "block"):
        assert shown[valid].all()


@pytest.mark.parametrize("masking", MASKINGS)
def test_what_invalid_tokens_hold_changes_nothing(masking):
    sampler, valid = make(masking).eval(), some_valid(masking)
    tokens = torch.randn(3, NUM_TOKENS, 8)
    others = tokens.masked_fill(~valid[..., None], torch.nan)

    def drawn(x):
        return sampler(x, generator=torch.Generator().manual_seed(0), valid=valid)

    for one, other in zip(drawn(tokens), drawn(others), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("masking", MASKINGS)
def test_with_all_tokens_valid_nothing_changes(masking):
    sampler, tokens = make(masking).eval(), torch.randn(3, NUM_TOKENS, 8)

    def drawn(**more):
        return sampler(tokens, generator=torch.Generator().manual_seed(0), **more)

    plain, with_valid = drawn(), drawn(valid=torch.ones(3, NUM_TOKENS, dtype=torch.bool))
    for one, other in zip(plain, with_valid._replace(valid=None), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("exploration", [0.0, 0.3])
def test_p_is_that_of_the_valid_tokens_alone(exploration):
    """The MLP scores each token by itself, so a clip without its invalid tokens has the same scores."""
    sampler = AdaptiveTokenSampler(8, GRID, 0.75, network="mlp", temperature=0.5, exploration=exploration).eval()
    tokens, valid = torch.randn(3, NUM_TOKENS, 8), some_valid("adaptive")
    log_probs = sampler(tokens, valid=valid).log_probs
    given = sampler(tokens, mask=~torch.zeros_like(valid).scatter_(1, first_valid(valid), True), valid=valid)
    torch.testing.assert_close(given.log_probs, log_probs)
    for clip in range(3):
        alone = sampler.scores(tokens[clip : clip + 1, valid[clip]]) / 0.5
        expected = (1 - exploration) * alone.softmax(1)[0] + exploration / int(valid[clip].sum())
        torch.testing.assert_close(log_probs[clip, valid[clip]].exp(), expected)
        assert not log_probs[clip, ~valid[clip]].exp().any()


def first_valid(valid, number=16):
    """The first valid tokens of each row."""
    return torch.stack([row.nonzero()[:number, 0] for row in valid])


def test_masks_that_are_uniform_stay_so_over_the_valid_tokens():
    valid = torch.rand(1, NUM_TOKENS) < 0.6
    valid[0, :20] = True
    sample = RandomTokenSampler(GRID, 0.75)(torch.zeros(8000, NUM_TOKENS, 1), valid=valid.expand(8000, -1))
    rate = (~sample.mask).float().mean(0)[valid[0]]
    expected = 16 / float(valid.sum())
    assert ((rate - expected).abs() < 5 * (expected * (1 - expected) / 8000) ** 0.5).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_bad_score_of_a_valid_token_comes_before_any_invalid_one(bad):
    scores = torch.randn(200, NUM_TOKENS)
    valid = torch.zeros(200, NUM_TOKENS, dtype=torch.bool)
    valid[:, 20:40] = True
    scores[:, 20:35] = bad
    sample = draw_valid(scores, 16, None, valid)
    assert valid.gather(1, sample.visible_idx).all()
    assert (sample.num_nonfinite == 15).all()
    assert sample.mask[:, 35:40].sum() == 0  # the good ones come first
    assert sample.log_probs[:, 35].isnan().all() == (bad != -torch.inf)  # and the loss shows the bad ones


def counted_errors(out, sample):
    """Each row's errors of masked tokens that are valid, by a loop; the tokens are `target_idx`."""
    for row, tokens in enumerate(sample.target_idx.tolist()):
        places = [place for place, token in enumerate(tokens) if sample.valid[row, token]]
        yield row, [tokens[place] for place in places], out[row, places]


def batch(masking="adaptive"):
    sampler, valid = make(masking).eval(), some_valid(masking)
    video = torch.randn(3, 3, 8, 32, 32)
    sample = sampler(torch.randn(3, NUM_TOKENS, 8), valid=valid)
    prediction = torch.randn(3, sample.target_idx.shape[1], 3 * 2 * 8 * 8, requires_grad=True)
    return prediction, video, sample


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_the_losses_are_means_over_masked_tokens_that_are_valid(kind):
    prediction, video, sample = batch()
    out = AdaMAELoss(0.5, patch_size=8, kind=kind, normalize=False)(prediction, video, sample)
    target = patchify(video, patch_size=8, tubelet_size=2)
    difference = prediction - target.gather(1, sample.masked_idx[..., None].expand_as(prediction))
    errors = (difference.square() if kind == "mse" else difference.abs()).mean(2)
    counted = list(counted_errors(errors, sample))
    number = sum(len(tokens) for _, tokens, _ in counted)
    reconstruction = sum(error.sum() for _, _, error in counted) / number
    sampling = -sum((sample.log_probs[row, tokens] * error).sum() for row, tokens, error in counted) / number
    torch.testing.assert_close(out.reconstruction, reconstruction)
    torch.testing.assert_close(out.sampling, sampling)
    got = torch.autograd.grad(out.reconstruction, prediction, retain_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(reconstruction, prediction, retain_graph=True)[0])
    got = torch.autograd.grad(out.sampling, sample.log_probs, retain_graph=True)[0]
    wanted = torch.autograd.grad(sampling, sample.log_probs)[0]
    assert not got[~sample.valid].any()
    torch.testing.assert_close(got, wanted)
    alone = reconstruction_error(prediction, video, sample, patch_size=8, kind=kind, normalize=False)
    assert torch.equal(alone, out.token_error)
    assert (alone == 0).sum() == sample.mask.numel() - sample.visible_idx.numel() - number


def test_policy_gradients_leave_invalid_tokens_out():
    prediction, _, sample = batch()
    error = torch.rand(prediction.shape[:2])
    rewards = torch.stack([each.mean() for _, _, each in counted_errors(error, sample)])
    advantage = rewards - (rewards.sum() - rewards) / 2
    log_p = torch.stack([
        set_log_prob(MaskSample(visible, masked, None, log_probs))[0]
        for visible, masked, log_probs in (without_invalid(sample, row) for row in range(3))
    ])  # fmt: skip
    loss = sampling_loss(sample, error, estimator="plackett_luce")
    torch.testing.assert_close(loss, (log_p * advantage).mean())
    (gradient,) = torch.autograd.grad(loss, sample.log_probs)
    assert gradient.isfinite().all()
    assert not gradient[~sample.valid].any()


def without_invalid(sample, row):
    """The row as a clip that never had its invalid tokens: visible and masked indices, log-probabilities."""
    kept = sample.valid[row].nonzero()[:, 0].tolist()
    places = {token: place for place, token in enumerate(kept)}
    visible = [places[token] for token in sample.visible_idx[row].tolist()]
    masked = [places[token] for token in sample.masked_idx[row].tolist() if token in places]
    return torch.tensor([visible]), torch.tensor([masked]), sample.log_probs[row : row + 1, kept]


def test_the_ranking_loss_has_no_pair_with_an_invalid_token():
    _, _, sample = batch("hard")
    error = torch.rand(sample.masked_idx.shape)
    loss = ranking_loss(sample, error)
    (gradient,) = torch.autograd.grad(loss, sample.difficulty)
    assert not gradient[~sample.valid].any()
    assert gradient[sample.valid & sample.mask].any()
    nothing = error.masked_fill(~sample.target_valid, 1e9)
    torch.manual_seed(0)
    first = ranking_loss(sample, error)
    torch.manual_seed(0)
    assert ranking_loss(sample, nothing) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_head_leaves_invalid_tokens_out(dtype, monkeypatch):
    monkeypatch.setattr("adamae_sampler.ops.head._CHUNK_BYTES", 5000)  # several chunks
    _, video, sample = batch()
    torch.manual_seed(0)
    values = 3 * 2 * 8 * 8
    inputs = [torch.randn(3, sample.masked_idx.shape[1], 16).to(dtype), torch.randn(values, 16), torch.randn(values)]
    results = []
    for fused in (True, False):
        hidden, weight, bias = (each.clone().requires_grad_() for each in inputs)
        head = HeadInputs(hidden, weight, bias)
        prediction = head if fused else torch.nn.functional.linear(hidden, weight.to(dtype), bias.to(dtype))
        out = AdaMAELoss(patch_size=8, fused_head=True)(prediction, video, sample)
        out.reconstruction.backward()
        results.append([out.reconstruction, out.token_error, hidden.grad, weight.grad, bias.grad])
    for one, other in zip(*results, strict=True):
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(one, other, **tolerance)
    assert not results[0][2][~sample.target_valid].any()


def test_a_decode_mask_and_invalid_tokens_together():
    _, video, sample = batch()
    decode_mask = torch.rand(3, NUM_TOKENS).argsort(1) < 32  # True = not decoded
    decoded = MaskSample.from_mask(decode_mask, 32).visible_idx
    prediction = torch.randn(3, 32, 3 * 2 * 8 * 8)
    out = AdaMAELoss(patch_size=8)(prediction, video, sample, decode_mask)
    count = (sample.mask & sample.valid).gather(1, decoded)
    everything = AdaMAELoss(patch_size=8)(prediction, video, MaskSample(sample.visible_idx, decoded, sample.mask))
    error = everything.token_error.detach()[count]
    torch.testing.assert_close(out.reconstruction, error.mean())
    torch.testing.assert_close(out.sampling, -(sample.log_probs.gather(1, decoded)[count] * error).mean())


def test_valid_masked_tokens_are_decoded_first():
    _, _, sample = batch()
    fewest = int(sample.target_valid.sum(1).min())
    for number in (fewest, fewest + 3):
        decoded = draw_decoded(sample, number)
        assert decoded.decoded_idx.shape == (3, number)
        assert (decoded.target_valid.sum(1) >= fewest).all()


@pytest.mark.parametrize(
    "options", [{}, {"sample_from": "pixels"}, {"num_masks": 2, "decode_ratio": 0.5}, {"fused_head": True}]
)
def test_the_reference_model_does_not_see_invalid_pixels(options):
    model = tiny_model(**options).train()
    video, valid = torch.randn(2, 3, 8, 32, 32), torch.ones(2, *GRID, dtype=torch.bool)
    valid[1, 2:] = False  # a short clip
    short = video.clone()
    short[1, :, 4:] = 0
    state = torch.get_rng_state()
    out, sample, gradients = step(model, video, valid=valid.flatten(1))
    torch.set_rng_state(state)
    again, other, _ = step(model, short, valid=valid.flatten(1))
    assert torch.equal(sample.mask, other.mask)
    torch.testing.assert_close(again.loss, out.loss)
    assert all(each.isfinite().all() for each in gradients.values())
    assert not torch.equal(step(model, short, mask=sample._replace(valid=None))[0].loss, out.loss)


def test_a_step_with_invalid_tokens_compiles_as_one_graph():
    model = tiny_model().train()
    video, valid = torch.randn(3, 3, 8, 32, 32), some_valid("adaptive")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    prediction, sample = compiled(video, valid=valid)
    assert valid.gather(1, sample.visible_idx).all()
    AdaMAELoss(patch_size=8)(prediction, video, sample).loss.backward()


@pytest.mark.parametrize("masking", MASKINGS)
def test_a_clip_with_too_few_valid_tokens_is_named(masking):
    sampler, valid = make(masking), torch.ones(3, NUM_TOKENS, dtype=torch.bool)
    valid[2, 16:] = False
    with (
        pytest.raises(
            ValueError, match=r"row 2 of valid has 16 valid tokens of 64, expected at least 1[67]: 1[56] are shown"
        )
        if masking != "tube"
        else pytest.raises(ValueError, match="row 2 of valid has")
    ):
        sampler(torch.randn(3, NUM_TOKENS, 8), valid=valid)


def test_bad_input():
    sampler, tokens = AdaptiveTokenSampler(8, GRID, 0.75), torch.randn(3, NUM_TOKENS, 8)
    valid = some_valid("adaptive")
    with pytest.raises(TypeError, match=r"valid is torch\.float32, expected a torch\.bool tensor"):
        sampler(tokens, valid=valid.float())
    with pytest.raises(ValueError, match=r"valid has shape \(2, 64\), expected \(3, 64\): clips, tokens"):
        sampler(tokens, valid=valid[:2])
    with pytest.raises(ValueError, match=r"valid has shape \(192,\), expected \[B, N\]"):
        sampler(tokens, valid=valid.flatten())
    drawn = sampler(tokens, valid=valid)
    assert torch.equal(sampler(tokens, mask=drawn).valid, valid)
    shows_invalid = valid.clone()
    shows_invalid[1, drawn.visible_idx[1, :2]] = False
    shows_invalid[1, drawn.masked_idx[1]] = True
    with pytest.raises(ValueError, match="row 1 of the given mask shows 2 tokens that are not valid"):
        sampler(tokens, mask=drawn.mask, valid=shows_invalid)
    with pytest.raises(ValueError, match="valid of the given MaskSample differs from valid of the call in row 1"):
        sampler(tokens, mask=drawn, valid=shows_invalid)
    with pytest.raises(ValueError, match="row 0 of valid has 1 valid tokens of 2, expected at least 2"):
        check_valid(torch.tensor([[True, False]]), 1)
    tube = torch.ones(1, *GRID, dtype=torch.bool)
    tube[0, 0, :3] = False
    with pytest.raises(
        ValueError, match=r"row 0 of valid has 4 valid positions, valid at all time steps, of 16, expected at least 5"
    ):
        make("tube")(torch.randn(1, NUM_TOKENS, 8), valid=tube.flatten(1))

    class Own(TokenSampler):
        num_visible = 16

        def draw(self, tokens, generator):
            return RandomTokenSampler(GRID, 0.75)(tokens)

    with pytest.raises(ValueError, match="Own takes no valid"):
        Own(GRID, 0.75)(tokens, valid=valid)


def test_hard_tokens_are_the_hardest_valid_ones():
    sampler = HardTokenSampler(8, GRID, 0.75, network="mlp", hard_share=1.0, ramp_steps=1).eval()
    sampler.share.set(1, 1)
    tokens, valid = torch.randn(3, NUM_TOKENS, 8), some_valid("hard")
    sample = sampler(tokens, valid=valid)
    for row in range(3):
        easiest = sample.difficulty[row].where(valid[row], torch.inf).argsort()[:16]
        assert torch.equal(easiest.sort().values, sample.visible_idx[row])
