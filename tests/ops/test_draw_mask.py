import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adamae_sampler.ops import draw_mask
from adamae_sampler.ops.draw import gumbel_noise

INF = math.inf
any_scores = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 33)),
    elements=st.one_of(
        st.floats(width=32),  # NaN and infinities among them
        st.sampled_from([0.0, 1e4, -1e4, INF, -INF, math.nan, 3.4e38, -3.4e38]),
    ),
)


def assert_partition(sample, batch, tokens, visible):
    assert sample.visible_idx.shape == (batch, visible)
    assert sample.masked_idx.shape == (batch, tokens - visible)
    assert sample.visible_idx.dtype == sample.masked_idx.dtype == torch.int64
    for row in range(batch):
        seen, hidden = sample.visible_idx[row].tolist(), sample.masked_idx[row].tolist()
        assert seen == sorted(set(seen))
        assert hidden == sorted(set(hidden))
        assert sorted(seen + hidden) == list(range(tokens))
        assert [i for i in range(tokens) if sample.mask[row, i]] == hidden


@given(any_scores, st.data())
def test_any_scores_give_exactly_k_distinct_ascending_indices(scores, data):
    visible = data.draw(st.integers(1, scores.shape[1] - 1))
    sample = draw_mask(torch.from_numpy(scores), visible)
    assert_partition(sample, *scores.shape, visible)
    assert sample.num_nonfinite.tolist() == (~np.isfinite(scores)).sum(1).tolist()


@pytest.mark.parametrize(
    "row",
    [
        [50.0, 0, 0, 0, 0, 0],
        [0.0] * 6,
        [INF, 0, 0, INF, 0, 0],
        [-INF] * 5 + [0],
        [math.nan] * 6,
        [math.nan, INF, -INF, 1e4, -1e4, 0],
        [0, 1e4, 2e4, 3e4, 4e4, 5e4],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_extreme_rows(row, dtype):
    for visible in range(1, 6):
        assert_partition(draw_mask(torch.tensor([row] * 3, dtype=dtype), visible), 3, 6, visible)


def test_non_finite_scores_rank_as_their_sign_says():
    row = torch.tensor([[0.0, math.nan, INF, 0.0, -INF, 0.0]])
    for _ in range(50):
        sample = draw_mask(row, 1)
        assert sample.visible_idx.tolist() == [[2]]
        sample = draw_mask(row, 4)
        assert sample.visible_idx.tolist() == [[0, 2, 3, 5]]
        assert sample.num_nonfinite.tolist() == [3]
        assert not sample.log_probs.isfinite().all()  # the caller sees them


def test_far_apart_scores_rank_strictly():
    sample = draw_mask(torch.tensor([[0.0, 2e4, 1e4, -1e4]]).expand(64, 4), 2)
    assert sample.visible_idx.unique(dim=0).tolist() == [[1, 2]]


@pytest.mark.parametrize("padding", [-1e9, torch.finfo(torch.float32).min, -INF, math.nan])
def test_padding_is_drawn_evenly_where_real_tokens_run_out(padding):
    scores = torch.cat([torch.randn(4000, 3), torch.full((4000, 9), padding)], 1)
    sample = draw_mask(scores, 6)
    assert not sample.mask[:, :3].any()
    seen = (~sample.mask[:, 3:]).double().mean(0)
    assert (seen - 1 / 3).abs().max() < 5 * (2 / 9 / 4000) ** 0.5


def test_minus_infinity_comes_after_every_number():
    sample = draw_mask(torch.tensor([[-INF, math.nan, -1e30, -1e9, 0.0, 0.0]]).expand(200, -1), 4)
    assert sample.visible_idx.unique(dim=0).tolist() == [[2, 3, 4, 5]]


def test_equal_keys_are_ranked_by_index():
    sample = draw_mask(torch.zeros(2, 9), 4, noise=torch.zeros(2, 9))
    assert sample.visible_idx.tolist() == [[0, 1, 2, 3]] * 2


def exact_inclusion(probs, visible):
    """P(token is visible) by enumerating every sequence of draws without replacement."""
    inclusion = [0.0] * len(probs)
    for sequence in itertools.permutations(range(len(probs)), visible):
        chance, left = 1.0, 1.0
        for token in sequence:
            chance *= probs[token] / left
            left -= probs[token]
        for token in sequence:
            inclusion[token] += chance
    return inclusion


@pytest.mark.parametrize(
    ("probs", "visible"), [([0.5, 0.3, 0.1, 0.07, 0.03], 2), ([0.7, 0.1, 0.1, 0.05, 0.04, 0.01], 3)]
)
def test_inclusion_probabilities_are_those_of_sampling_without_replacement(probs, visible):
    draws = 200_000
    sample = draw_mask(torch.tensor(probs).log().expand(draws, -1) + 7.0, visible)
    found = (~sample.mask).double().mean(0)
    exact = torch.tensor(exact_inclusion(probs, visible), dtype=torch.float64)
    deviation = (exact * (1 - exact) / draws).sqrt()
    assert ((found - exact).abs() < 5 * deviation).all(), (found, exact)


def test_sets_have_their_exact_probability():
    """The probability of each visible pair, p_i p_j (1/(1-p_i) + 1/(1-p_j)), and not only of each token."""
    probs, draws = [0.6, 0.25, 0.1, 0.05], 100_000
    sample = draw_mask(torch.tensor(probs).log().expand(draws, -1), 2)
    for i, j in itertools.combinations(range(4), 2):
        exact = probs[i] * probs[j] * (1 / (1 - probs[i]) + 1 / (1 - probs[j]))
        found = (sample.visible_idx == torch.tensor([i, j])).all(1).double().mean().item()
        assert abs(found - exact) < 5 * math.sqrt(exact * (1 - exact) / draws)


def test_gumbel_noise_has_its_moments():
    noise = gumbel_noise(torch.empty(1000, 1000))
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.005)


def test_randomness_follows_torch():
    scores = torch.randn(3, 50)
    torch.manual_seed(5)
    first = draw_mask(scores, 10).visible_idx
    assert not torch.equal(first, draw_mask(scores, 10).visible_idx)
    torch.manual_seed(5)
    assert torch.equal(first, draw_mask(scores, 10).visible_idx)

    state = torch.get_rng_state()
    own = [draw_mask(scores, 10, generator=torch.Generator().manual_seed(3)).visible_idx for _ in range(2)]
    assert torch.equal(*own)
    assert torch.equal(state, torch.get_rng_state())  # a generator leaves the global state alone


def test_log_probs_are_fp32_log_softmax_with_gradient():
    scores = torch.randn(2, 7, dtype=torch.bfloat16, requires_grad=True)
    log_probs = draw_mask(scores, 3).log_probs
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, scores.float().log_softmax(1))
    log_probs[:, 0].sum().backward()
    assert scores.grad.abs().sum() > 0
    double = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 5)
    assert torch.autograd.gradcheck(lambda x: draw_mask(x, 2, noise=noise).log_probs, double)


def test_inputs_are_not_written():
    scores, noise = torch.tensor([[1.0, INF, math.nan, 2.0]]), torch.zeros(1, 4)
    before = scores.clone()
    draw_mask(scores, 2, noise=noise)
    assert torch.equal(scores.nan_to_num(9), before.nan_to_num(9))
    assert not noise.any()


def test_empty_batch_and_strided_scores():
    assert draw_mask(torch.zeros(0, 5), 2).visible_idx.shape == (0, 2)
    scores = torch.randn(10, 4).t()
    noise = torch.randn(4, 10)
    strided, contiguous = draw_mask(scores, 3, noise=noise), draw_mask(scores.contiguous(), 3, noise=noise)
    assert torch.equal(strided.visible_idx, contiguous.visible_idx)
    assert draw_mask(torch.zeros(1, 6).expand(5, 6), 3).mask.shape == (5, 6)


def test_bad_input():
    scores = torch.zeros(2, 5)
    with pytest.raises(TypeError, match=r"scores has dtype torch.int64, expected a floating-point"):
        draw_mask(scores.long(), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 1\), expected \[B, N\]"):
        draw_mask(scores[..., None], 2)
    for visible in (0, 5, -1):
        with pytest.raises(ValueError, match=f"num_visible={visible} of 5 tokens"):
            draw_mask(scores, visible)
    with pytest.raises(ValueError, match=r"noise has shape \(5,\), expected \(2, 5\), as scores"):
        draw_mask(scores, 2, noise=torch.zeros(5))
    with pytest.raises(ValueError, match="both given"):
        draw_mask(scores, 2, noise=scores, generator=torch.Generator())


def test_compiles_without_graph_breaks():
    compiled = torch.compile(draw_mask, fullgraph=True, backend="aot_eager")
    scores, noise = torch.randn(3, 20), torch.randn(3, 20)
    assert torch.equal(compiled(scores, 6, noise=noise).visible_idx, draw_mask(scores, 6, noise=noise).visible_idx)
    assert_partition(compiled(scores, 6), 3, 20, 6)
