"""Every Triton kernel against the op's plain-PyTorch reference: outputs and all gradients.

On a machine without a GPU the kernels run in Triton's interpreter (see conftest.py). Every test poisons uninitialised
memory, so that a place that no kernel wrote is seen.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    DEVICE,
    DTYPES,
    OPS,
    assert_close,
    assert_same,
    make_sample,
    run,
    run_both,
    whole_numbers,
)

from adamae_sampler import ops
from adamae_sampler.ops import assemble, norm
from adamae_sampler.ops.draw import _gumbel, gumbel_noise

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language")
INF, NAN = math.inf, math.nan

# The mode that poisons memory also warns about PyTorch's own operators, and the references use those.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def draw_both(scores, visible, noise=None):
    noise = gumbel_noise(scores) if noise is None else noise
    with ops.use_backend("torch"):
        expected = ops.draw_mask(scores, visible, noise=noise)
    with ops.use_backend("triton"):
        return expected, ops.draw_mask(scores, visible, noise=noise)


def assert_same_draw(expected, got):
    for name in ("visible_idx", "masked_idx", "mask", "num_nonfinite"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("tokens", [2, 3, 31, 32, 33, 127, 129, 1568, 4095, 4096, 4097, 18432])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_noise_gives_the_same_draw(tokens, dtype):
    """Up to 4096 tokens are one tile; more are several."""
    scores = (3 * torch.randn(2, tokens)).to(DEVICE, dtype)
    for visible in sorted({1, tokens // 20 or 1, tokens - 1}):
        assert_same_draw(*draw_both(scores, visible))


numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1e-30, -1e9, 3e38, INF, -INF, NAN]), st.floats(-30, 30, width=32))


@settings(max_examples=60)
@given(st.data(), st.integers(2, 40), st.integers(1, 3), st.booleans())
def test_any_scores_and_noise_with_ties(data, tokens, batch, tied):
    row = st.lists(numbers, min_size=tokens, max_size=tokens)
    scores = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)), device=DEVICE)
    noise = torch.randint(-2, 3, (batch, tokens)).to(DEVICE, torch.float32) if tied else None
    assert_same_draw(*draw_both(scores, data.draw(st.integers(1, tokens - 1)), noise))


def test_ties_across_tiles_go_to_the_lower_index():
    scores = torch.zeros(1, 9000, device=DEVICE)
    for visible in (3, 4096, 4100, 8999):
        with ops.use_backend("triton"):
            sample = ops.draw_mask(scores, visible, noise=torch.zeros_like(scores))
        assert torch.equal(sample.visible_idx[0], torch.arange(visible, device=DEVICE))
        assert torch.equal(sample.masked_idx[0], torch.arange(visible, 9000, device=DEVICE))


def test_noise_that_is_nan_or_negative_zero_ranks_as_torch_sorts():
    noise = torch.tensor([[NAN, 0.0, -0.0, 1.0, -NAN, -0.0, 0.0, INF]], device=DEVICE)
    for visible in range(1, 8):
        for zero in (0.0, -0.0):
            scores = torch.full((1, 8), zero, device=DEVICE).index_fill(1, torch.tensor([0], device=DEVICE), 0.0)
            assert_same_draw(*draw_both(scores, visible, noise))


@pytest.mark.parametrize("tokens", [2, 33, 127, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_log_probs(tokens, dtype):
    scores, noise = torch.randn(3, tokens).to(DEVICE, dtype), torch.randn(3, tokens, device=DEVICE)
    upstream = torch.randn(1, tokens, device=DEVICE).expand(3, -1)
    reference, kernel = run_both(lambda x: ops.draw_mask(x, 1, noise=noise).log_probs, scores, upstream=upstream)
    assert_close(reference, kernel, dtype)
    assert kernel[1].dtype == dtype


def test_the_draw_follows_the_generator():
    scores = torch.randn(4, 50, device=DEVICE)
    with ops.use_backend("triton"):
        draw = lambda **kwargs: ops.draw_mask(scores, 10, **kwargs).visible_idx  # noqa: E731
        torch.manual_seed(5)
        first = draw()
        assert not torch.equal(first, draw())
        torch.manual_seed(5)
        assert torch.equal(first, draw())
        own = [draw(generator=torch.Generator(DEVICE).manual_seed(3)) for _ in range(2)]
        assert torch.equal(*own)
    assert not (first[0] == first[1]).all()  # clips differ


@triton.jit
def noise_kernel(seed_ptr, out_ptr, TOKENS: tl.constexpr):
    token = tl.arange(0, TOKENS)
    tl.store(out_ptr + tl.program_id(0) * TOKENS + token, _gumbel(tl.load(seed_ptr), tl.program_id(0), token))


def test_the_kernels_noise_is_standard_gumbel_and_independent():
    clips, tokens = 8, 1 << 15
    noise = torch.empty(2, clips, tokens, device=DEVICE)
    for seed, out in zip((7, 2**40 + 7), noise, strict=True):
        noise_kernel[(clips,)](torch.tensor([seed], device=DEVICE), out, TOKENS=tokens)
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise.double())).cpu()  # the distribution function makes it uniform
    count = uniform.numel()
    ranks = uniform.flatten().sort().values
    distance = (ranks - (torch.arange(count, dtype=torch.float64) + 0.5) / count).abs().max().item()
    assert distance < 1.95 / count**0.5  # Kolmogorov-Smirnov test at the 0.1% level
    streams = uniform.flatten(0, 1)  # a stream for each clip and seed, tested also against itself one token later
    correlation = torch.corrcoef(torch.cat([streams, streams.roll(1, 1)]))
    assert (correlation - torch.eye(4 * clips)).abs().max() < 5 / tokens**0.5


# (clips, tokens, visible tokens, width): 1, primes, 2^n and 2^n +- 1.
ROWS = [(1, 2, 1, 1), (2, 7, 3, 5), (3, 37, 11, 48), (2, 33, 32, 127), (1, 64, 17, 129), (2, 16, 5, 768)]


def pos_of(kind, batch, tokens, width):
    if kind == "none":
        return []
    return [whole_numbers(*{"table": (tokens, width), "one": (1, tokens, width), "each": (batch, tokens, width)}[kind])]


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("kind", ["none", "table", "one", "each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_tokens(size, kind, dtype):
    batch, tokens, visible, width = size
    idx = make_sample(batch, tokens, visible).visible_idx
    x = whole_numbers(batch, tokens, width, dtype=dtype)
    call = lambda x, pos=None: ops.gather_tokens(x, idx, pos)  # noqa: E731
    assert_same(*run_both(call, x, *pos_of(kind, batch, tokens, width)))


@pytest.mark.parametrize("kind", ["none", "one", "each"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", [2, 5])
def test_gather_for_several_masks_of_a_clip(masks, kind, dtype):
    """The gradient of a token is the sum over the masks that show it. Copies of the clips give the same."""
    batch, tokens, visible, width = 3, 37, 11, 48
    idx = make_sample(batch * masks, tokens, visible).visible_idx
    x, pos = whole_numbers(batch, tokens, width, dtype=dtype), pos_of(kind, batch, tokens, width)
    call = lambda x, pos=None: ops.gather_tokens(x, idx, pos)  # noqa: E731
    upstream = whole_numbers(batch * masks, visible, width, dtype=dtype)
    reference, kernel = run_both(call, x, *pos, upstream=upstream)
    assert_same(reference, kernel)
    apart = lambda x, pos=None: ops.gather_tokens(  # noqa: E731
        x.repeat_interleave(masks, 0), idx, pos.repeat_interleave(masks, 0) if kind == "each" else pos
    )
    assert_same(run("torch", apart, [x, *pos], upstream), reference)
    with pytest.raises(ValueError, match=r"expected \[3, K\]: a row for each clip, or R for each"):
        ops.gather_tokens(x, idx[:4])


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_are_rounded_to_the_tokens_dtype_before_they_are_added(batch):
    """One table for all clips, and one for each. The tokens are fp16, which the interpreter rounds as hardware does."""
    sample = make_sample(2, 37, 11)
    x, mask_token = torch.randn(2, 37, 5).to(DEVICE, torch.float16), torch.randn(5, device=DEVICE)
    pos = torch.randn(batch, 37, 5, device=DEVICE)
    assert_same(*run_both(lambda x: ops.gather_tokens(x, sample.visible_idx, pos), x))
    for order in ("concat", "restore"):
        assert_same(*run_both(lambda v: ops.assemble_tokens(v, mask_token, pos, sample, order), x[:, :11]))  # noqa: B023


def test_gather_takes_any_order_and_strides():
    x = whole_numbers(5, 12, 3).transpose(0, 2)  # [3, 12, 5]
    idx = torch.stack([torch.randperm(12)[:8] for _ in range(3)]).to(DEVICE)[:, ::2]
    pos = whole_numbers(5, 12).t()
    upstream = whole_numbers(3, 1, 5).expand(3, 4, 5)
    before = x.clone(), idx.clone(), pos.clone()
    assert_same(*run_both(lambda x, p: ops.gather_tokens(x, idx, p), x, pos, upstream=upstream))
    assert all(torch.equal(*each) for each in zip((x, idx, pos), before, strict=True))  # inputs are not written
    expanded = whole_numbers(1, 12, 5).expand(3, 12, 5)
    assert_same(*run_both(lambda x: ops.gather_tokens(x, idx), expanded))


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("kind", ["table", "one", "each"])
@pytest.mark.parametrize("order", ["concat", "restore"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assemble_tokens(size, kind, order, dtype):
    batch, tokens, visible, width = size
    sample = make_sample(batch, tokens, visible)
    leaves = whole_numbers(batch, visible, width, dtype=dtype), whole_numbers(1, 1, width)
    call = lambda v, m, p: ops.assemble_tokens(v, m, p, sample, order)  # noqa: E731
    assert_same(*run_both(call, *leaves, *pos_of(kind, batch, tokens, width)))


@pytest.mark.parametrize("kind", ["table", "each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_assemble_a_part_of_the_masked_tokens(kind, dtype):
    sample = make_sample(3, 37, 11)
    part = sample._replace(decoded_idx=sample.masked_idx[:, 3::4])  # 6 of 26
    leaves = whole_numbers(3, 11, 48, dtype=dtype), whole_numbers(1, 1, 48), *pos_of(kind, 3, 37, 48)
    call = lambda v, m, p: ops.assemble_tokens(v, m, p, part)  # noqa: E731
    reference, kernel = run_both(call, *leaves)
    assert_same(reference, kernel)
    whole = ops.assemble_tokens(*leaves, sample)
    assert torch.equal(reference[0], torch.cat([whole[:, :11], whole[:, 11 + 3 :: 4]], 1))
    with pytest.raises(ValueError, match=r"leaves masked tokens out .* order='restore' needs all tokens"):
        ops.assemble_tokens(*leaves, part, "restore")


@pytest.mark.parametrize("order", ["concat", "restore"])
def test_assemble_honours_strides(order):
    sample = make_sample(3, 12, 4)
    visible, mask_token, pos = whole_numbers(5, 4, 3).transpose(0, 2), whole_numbers(10)[::2], whole_numbers(5, 12).t()
    upstream = whole_numbers(5, 1, 3).transpose(0, 2).expand(3, 12, 5)
    call = lambda v, m, p: ops.assemble_tokens(v, m, p, sample, order)  # noqa: E731
    assert_same(*run_both(call, visible, mask_token, pos, upstream=upstream))


def test_mask_token_gradient_of_many_rows(monkeypatch):
    """The sum has more rows than its first stage has programs."""
    monkeypatch.setattr(assemble, "_MOST_PARTS", 16)
    sample = make_sample(7, 11, 3)
    for order in ("concat", "restore"):
        call = lambda m: ops.assemble_tokens(torch.zeros(7, 3, 3, device=DEVICE), m, m.expand(11, 3), sample, order)  # noqa: B023, E731
        reference, kernel = run_both(call, torch.zeros(3, device=DEVICE), upstream=torch.rand(7, 11, 3, device=DEVICE))
        assert_close(reference, kernel)


def test_mask_token_gradient_adds_its_own_rows_alone(monkeypatch):
    """The last part of the sum ends past the last row, where another tensor's memory lies."""
    monkeypatch.setattr(assemble, "_MOST_PARTS", 16)
    sample, width = make_sample(1, 33, 1), 1024
    upstream = torch.ones(2, 33, width, device=DEVICE)[:1]
    visible, pos = torch.zeros(1, 1, width, device=DEVICE), torch.zeros(33, width, device=DEVICE)
    call = lambda m: ops.assemble_tokens(visible, m, pos, sample)  # noqa: E731
    assert_same(*run_both(call, torch.zeros(width, device=DEVICE), upstream=upstream))


@pytest.mark.parametrize("rows", [(1, 1), (3, 13)])
@pytest.mark.parametrize("width", [5, 48, 384])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm(rows, width, branch, dtype, monkeypatch):
    """The sum, the norm and all gradients of both, against the reference in fp64.

    The sum gets a gradient of its own too, since the residual stream bypasses the norm. With (3, 13) there are more
    rows than the gradient of the weights has parts.
    """
    monkeypatch.setattr(norm, "_MOST_PARTS", 5)
    leaves = [torch.randn(*rows, width).to(DEVICE, dtype) for _ in range(1 + branch)]
    leaves += [torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)]

    def call(*leaves):
        *summands, weight, bias = leaves
        total, normed = ops.add_norm(summands[0], summands[1] if branch else None, weight, bias, 1e-6)
        return torch.stack([total, normed])

    upstream = torch.randn(2, *rows, width).to(dtype)
    kernel = run("triton", call, leaves, upstream)
    expected = run("torch", call, [leaf.double() for leaf in leaves], upstream.double())
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert [each.dtype for each in kernel] == [dtype, *[leaf.dtype for leaf in leaves]]
    for want, got in zip(expected, kernel, strict=True):
        assert (got - want).norm() <= close * max(want.norm(), 1e-3)


def test_add_norm_of_a_part_of_the_tokens():
    x, branch = torch.randn(3, 9, 16, device=DEVICE), torch.randn(3, 9, 16, device=DEVICE)
    ones, zeros = torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    call = lambda x, branch: ops.add_norm(x[:, 4:], branch[:, 4:], ones, zeros)[1]  # noqa: E731
    assert_close(*run_both(call, x, branch, upstream=torch.randn(3, 5, 16)))
    for bad, name in ((branch[:, :4], "branch"), (ones[:3], "weight")):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            ops.add_norm(x, bad if name == "branch" else None, bad if name == "weight" else ones, zeros)


@pytest.mark.parametrize("width", [1, 48, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_scores(width, dtype):
    x, weight = torch.randn(2, 37, width).to(DEVICE, dtype), torch.randn(width, device=DEVICE)
    bias = torch.randn(1, device=DEVICE)
    reference, kernel = run_both(ops.token_scores, x, weight, bias, upstream=torch.randn(2, 37))
    assert kernel[0].dtype == torch.float32
    torch.testing.assert_close(kernel[0], reference[0], rtol=1e-5, atol=1e-5)
    for expected, got in zip(reference[1:], kernel[1:], strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= {torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 2e-2) * expected.norm()


@pytest.mark.parametrize(("batch", "tokens", "visible"), [(1, 2, 1), (3, 37, 11), (2, 128, 1), (2, 2500, 129)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampling_loss(batch, tokens, visible, dtype):
    idx = make_sample(batch, tokens, visible).masked_idx
    log_probs = (4 * torch.randn(batch, tokens)).log_softmax(1).to(DEVICE, dtype)
    error = torch.rand(batch, tokens - visible).to(DEVICE, dtype)
    reference, kernel = run_both(lambda x: ops.sampling_loss(x, idx, error), log_probs, upstream=torch.tensor(3.0))
    assert_close(reference[:1], kernel[:1])
    assert_close(reference[1:], kernel[1:], dtype)


def test_sampling_loss_clamps_and_keeps_nan():
    idx = torch.tensor([[0, 1, 3]], device=DEVICE)
    error = torch.ones(1, 3, device=DEVICE)
    for low, high in ((-100.0, -1e-9), (NAN, -1.0), (-INF, 0.0)):
        log_probs = torch.tensor([[low, -2.0, -1.0, high]], device=DEVICE)
        call = lambda x: ops.sampling_loss(x.expand(2, 4), idx.expand(2, 3), error.expand(2, 3))  # noqa: E731
        assert_close(*run_both(call, log_probs, upstream=torch.tensor(1.0)))


def test_sampling_loss_clamps_certainty():
    """log p is at most log(1 - 2^-23). A large error makes that visible."""
    idx, error = torch.tensor([[0, 1]], device=DEVICE), torch.full((1, 2), 1e6, device=DEVICE)
    log_probs = torch.zeros(1, 3, device=DEVICE)
    reference, kernel = run_both(lambda x: ops.sampling_loss(x, idx, error), log_probs, upstream=torch.tensor(1.0))
    assert kernel[0] > 0.1
    assert_close(reference, kernel)


def test_token_scores_keep_gradients_too_small_for_fp16():
    x, weight = torch.randn(2, 37, 16).to(DEVICE, torch.float16), torch.randn(16, device=DEVICE)
    inputs = [x, weight, torch.zeros(1, device=DEVICE)]
    _, _, of_weight, _ = run("triton", ops.token_scores, inputs, torch.full((2, 37), 1e-9))
    torch.testing.assert_close(of_weight, 1e-9 * x.float().sum((0, 1)), rtol=5e-3, atol=1e-11)
    assert run("triton", ops.token_scores, inputs, torch.zeros(2, 37))[2].eq(0).all()


def test_weights_of_norms_and_scores_may_have_any_strides():
    x, weight = torch.randn(2, 7, 16, device=DEVICE), torch.randn(32, device=DEVICE)[::2]
    bias = torch.zeros((), device=DEVICE)
    assert_close(*run_both(lambda x: ops.add_norm(x, x, weight, bias.expand(16))[1], x, upstream=torch.randn(2, 7, 16)))
    assert_close(*run_both(lambda x: ops.token_scores(x, weight, weight[:1]), x, upstream=torch.randn(2, 7)))


def test_an_index_out_of_range_gives_nan_and_touches_nothing_else():
    """The public functions refuse such an index on CPU. On a GPU the check would make the host wait, so they cannot."""
    x, pos = whole_numbers(1, 4, 3), whole_numbers(1, 4, 3)
    for bad in (-1, 4, 2**40):
        idx = torch.tensor([[1, bad, 3]], device=DEVICE)
        assert OPS.gather_tokens(x, idx, pos).isnan().all(-1).tolist() == [[False, True, False]]
        scattered = OPS.scatter_tokens(x[:, :3], idx, 1, 4, torch.float32)
        assert torch.equal(scattered[0, [1, 3]], x[0, [0, 2]])
        assert not scattered[0, [0, 2]].any()
        full = OPS.assemble_tokens(x[:, :3], x[0, 0], pos, idx, torch.tensor([[0]], device=DEVICE), False)
        assert full.isnan().all(-1).tolist() == [[False, True, False, False]]
        how = ("mse", True, [1, 2, 2], None, None)
        prediction, video = torch.randn(1, 3, 4, device=DEVICE), torch.rand(1, 1, 1, 4, 4, device=DEVICE)
        error, unit = OPS.reconstruction_error(prediction, video, idx, *how, True)
        assert error.isnan().tolist() == [[False, True, False]]
        assert unit.isnan().all(-1).tolist() == [[False, True, False]]
        patches = OPS.patch_tokens(video, idx, [1, 2, 2], torch.float32, 0.0)
        assert patches.isnan().all(-1).tolist() == [[False, True, False]]
        assert torch.equal(patches[0, 0], video[0, 0, 0, :2, 2:].flatten())
        assert OPS.sampling_loss(x[..., 0], idx, prediction[..., 0]).isnan()


def test_a_token_named_twice_has_a_nan_gradient():
    """The kernels write and do not add, so they mark the gradient that they cannot compute."""
    grad, idx = whole_numbers(1, 3, 2), torch.tensor([[1, 3, 1]], device=DEVICE)
    assert OPS.scatter_tokens(grad, idx, 1, 4, torch.float32).isnan().all(-1).tolist() == [[False, True, False, False]]
    assert OPS.scatter_tokens_sum(grad, idx, 4, torch.float32).isnan().all(-1).tolist() == [[False, True, False, False]]
    full = OPS.assemble_tokens(grad, grad[0, 0], grad.new_zeros(1, 5, 2), idx, idx[:, :2], True)
    assert full.isnan().all(-1).tolist() == [[False, True, False, False, False]]
    log_probs, error = torch.full((1, 4), -1.0, device=DEVICE), torch.ones(1, 3, device=DEVICE)
    loss_grad = OPS.sampling_loss_backward(torch.ones((), device=DEVICE), log_probs, idx, error)
    assert loss_grad.isnan().tolist() == [[False, True, False, False]]


def test_empty_batch():
    with ops.use_backend("triton"):
        sample = ops.draw_mask(torch.zeros(0, 8, device=DEVICE), 3)
        x = torch.zeros(0, 8, 4, device=DEVICE, requires_grad=True)
        gathered = ops.gather_tokens(x, sample.visible_idx)
        full = ops.assemble_tokens(gathered, torch.zeros(4, device=DEVICE), torch.zeros(8, 4, device=DEVICE), sample)
        video = torch.zeros(0, 1, 2, 4, 4, device=DEVICE)
        error = ops.reconstruction_error(full[:, 3:], video, sample.masked_idx, patch_size=2, tubelet_size=1)
        (full.sum() + error.sum()).backward()
    assert sample.mask.shape == (0, 8)
    assert x.grad.shape == x.shape
