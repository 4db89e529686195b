"""Motion masks: p against loops, draws against the enumeration of draws without replacement."""

import itertools
from collections import Counter

import pytest
import torch
from distributions import agrees_with, masks_of

from adamae_sampler import AdaMAELoss, MotionTokenSampler, sampling_loss
from adamae_sampler.mask import MaskSample
from adamae_sampler.sampler import TokenSampler
from adamae_sampler.sampler.draws import draw_uniform

GRID = (4, 3, 5)


def p_by_loop(change, floor):
    """p of a clip, given the change [T - 1, positions] of each token but those of the first time step."""
    change = [*change[:1], *change]
    total = sum(sum(step) for step in change)
    count = sum(map(len, change))
    shares = [each / total if total else 1 / count for step in change for each in step]
    return torch.tensor([(1 - floor) * each + floor / count for each in shares])


def test_p_of_tokens():
    tokens = torch.randn(2, 60, 8)
    found = MotionTokenSampler(GRID, floor=0.3).log_probs(tokens)
    for clip in range(2):
        steps = tokens[clip].view(4, 15, 8)
        change = [[float((steps[t, i] - steps[t - 1, i]).norm()) for i in range(15)] for t in range(1, 4)]
        torch.testing.assert_close(found[clip].exp(), p_by_loop(change, 0.3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_p_of_pixels(dtype):
    video = torch.randint(256, (2, 3, 8, 6, 20), dtype=torch.uint8)  # a token is 2 x 2 x 4 pixels
    given = video if dtype == torch.uint8 else video / 255 - 0.5
    found = MotionTokenSampler(GRID, source="pixels").log_probs(torch.zeros(2, 60, 1), given)
    for clip in range(2):
        pixels = video[clip].long().view(3, 4, 2, 3, 2, 5, 4)  # C, T, frames, H, height, W, width
        change = [
            [float((pixels[:, t, :, y, :, x] - pixels[:, t - 1, :, y, :, x]).abs().sum()) for y in range(3) for x in range(5)]
            for t in range(1, 4)
        ]  # fmt: skip
        torch.testing.assert_close(found[clip].exp(), p_by_loop(change, 0.2))


def test_clips_in_which_nothing_changes_have_an_even_p():
    tokens = torch.randn(1, 1, 8).expand(2, 60, 8).clone()
    tokens[1, 50] = 1e9
    p = MotionTokenSampler(GRID).log_probs(tokens).exp()
    torch.testing.assert_close(p[0], torch.full((60,), 1 / 60))
    torch.testing.assert_close(p[1, 50], torch.tensor(0.8 + 0.2 / 60))


def test_changes_that_are_not_finite_are_drawn_first_or_last_and_spoil_no_other():
    tokens = torch.randn(1, 60, 8)
    whole = MotionTokenSampler(GRID).log_probs(tokens)[0]
    tokens[0, 50], tokens[0, 20] = torch.inf, torch.nan  # 20 and the token a step later change by NaN
    sample = MotionTokenSampler(GRID, 0.9)(tokens.expand(200, -1, -1))
    assert sample.num_nonfinite.tolist() == [4] * 200
    assert not sample.mask[:, 50].any()
    assert sample.mask[:, [5, 20, 35]].all()
    log_probs = MotionTokenSampler(GRID).log_probs(tokens)[0]
    kept = log_probs.isfinite()
    p, before = (each[kept].exp() - 0.2 / 60 for each in (log_probs, whole))
    torch.testing.assert_close(p / p.sum(), before / before.sum())


def test_draws_are_those_without_replacement():
    sampler = MotionTokenSampler((2, 1, 3), 0.5)
    tokens = torch.tensor([0.0, 0.0, 0.0, 4.0, 1.0, 0.0]).view(1, 6, 1)
    p = sampler.log_probs(tokens).exp()[0].tolist()
    expected = Counter()
    for i, j, k in itertools.permutations(range(6), 3):
        expected[tuple(sorted((i, j, k)))] += p[i] * p[j] / (1 - p[i]) * p[k] / (1 - p[i] - p[j])
    assert agrees_with(masks_of(sampler, 40_000, tokens=tokens), expected)


def test_nothing_is_learned():
    sampler = MotionTokenSampler(GRID, 0.75)
    tokens = torch.randn(2, 60, 8, requires_grad=True)
    sample = sampler(tokens)
    assert sample.log_probs is sample.difficulty is None
    assert not sampler.log_probs(tokens).requires_grad
    video, error = torch.randn(2, 3, 8, 6, 20), torch.ones(2, 45)
    out = AdaMAELoss(patch_size=(2, 4))(torch.zeros(2, 45, 48), video, sample)
    assert out.sampling == 0
    assert out.loss == out.reconstruction
    with pytest.raises(ValueError, match="no distribution to learn"):
        sampling_loss(sample, error)


def test_a_sampler_of_ones_own_may_take_the_video_or_not():
    class Plain(TokenSampler):
        num_visible = 15

        def draw(self, tokens, generator):
            return draw_uniform(tokens, 1, 60, 15, generator)

    class Brightest(Plain):
        uses_video = True

        def draw(self, tokens, generator, video):
            bright = video.float().mean((1, 2, 3, 4)) > 0.5
            mask = torch.arange(60) < 45
            return MaskSample.from_mask(torch.where(bright[:, None], mask, mask.flip(0)), 15)

        def complete(self, tokens, given, video):
            return super().complete(tokens, given, video)._replace(difficulty=video.mean((1, 2, 3, 4)))

    tokens, video = torch.zeros(2, 60, 8), torch.zeros(2, 3, 8, 6, 20)
    video[1] = 1
    assert Plain(GRID, 0.75)(tokens).num_visible == Plain(GRID, 0.75)(tokens, video=video).num_visible == 15
    drawn = Brightest(GRID, 0.75)(tokens, video=video)
    assert drawn.visible_idx[:, 0].tolist() == [0, 45]
    assert Brightest(GRID, 0.75)(tokens, video=video, mask=drawn).difficulty.tolist() == [0, 1]


def test_the_video_must_be_there_and_fit():
    sampler, tokens = MotionTokenSampler(GRID, 0.75, source="pixels"), torch.zeros(2, 60, 8)
    for kind, message, video in (
        (ValueError, r"draws from the pixels and got no video. Pass it, sampler\(tokens, video=video\)", None),
        (ValueError, r"video has shape \(2, 3, 6, 6, 20\), expected .* multiples of the grid", torch.zeros(2, 3, 6, 6, 20)),
        (ValueError, r"for images video\[:, :, None\]", torch.zeros(2, 3, 6, 20)),
        (ValueError, "video has 1 clips and tokens have 2", torch.zeros(1, 3, 8, 6, 20)),
        (TypeError, "video is torch.int64, expected", torch.zeros(2, 3, 8, 6, 20).long()),
        (TypeError, "video is list, expected", [1]),
        (ValueError, "video is on meta and tokens are on cpu", torch.zeros(2, 3, 8, 6, 20, device="meta")),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            sampler(tokens, video=video)
    mask = MotionTokenSampler(GRID, 0.75)(tokens).mask
    assert torch.equal(sampler(tokens, mask=mask).mask, mask)  # a given mask needs no video


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("has one time step, expected two", lambda: MotionTokenSampler((1, 4, 4))),
        ("source='flow', expected 'tokens' or 'pixels'", lambda: MotionTokenSampler(GRID, source="flow")),
        ("floor=0, expected a share of p above 0", lambda: MotionTokenSampler(GRID, floor=0)),
        ("floor=1.1, expected", lambda: MotionTokenSampler(GRID, floor=1.1)),
    ],
)
def test_bad_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
