"""The plain-PyTorch ops against slow oracles: gather, assemble, patches, reconstruction error, sampling loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamae_sampler import MaskSample, ops

sizes = st.integers(1, 3)


def make_sample(batch, tokens, visible, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ops.draw_mask(torch.zeros(batch, tokens), visible, generator=generator)


def pos_of(kind, batch, tokens, width):
    shape = {"table": (tokens, width), "one": (1, tokens, width), "each": (batch, tokens, width)}[kind]
    return torch.randn(shape, dtype=torch.float64)


@given(st.integers(0, 3), st.integers(2, 17), st.integers(1, 9), st.sampled_from(["none", "table", "one", "each"]))
def test_gather_takes_rows_and_adds_their_position(batch, tokens, width, kind):
    x = torch.randn(batch, tokens, width, dtype=torch.float64)
    sample = make_sample(batch, tokens, max(1, tokens // 3))
    pos = None if kind == "none" else pos_of(kind, batch, tokens, width)
    got = ops.gather_tokens(x, sample.visible_idx, pos)
    assert got.shape == (batch, sample.num_visible, width)
    for b in range(batch):
        for k, i in enumerate(sample.visible_idx[b].tolist()):
            at = 0 if pos is None else (pos[i] if pos.ndim == 2 else pos[min(b, pos.shape[0] - 1), i])
            assert torch.equal(got[b, k], x[b, i] + at)


def test_gather_works_on_strided_and_expanded_tokens_and_writes_nothing():
    x = torch.randn(5, 12, 3).transpose(0, 2)  # [3, 12, 5]
    idx = make_sample(3, 12, 4).visible_idx
    before = x.clone()
    assert torch.equal(ops.gather_tokens(x, idx), ops.gather_tokens(x.contiguous(), idx))
    assert torch.equal(x, before)
    expanded = torch.randn(1, 12, 5).expand(3, 12, 5)
    assert torch.equal(ops.gather_tokens(expanded, idx), ops.gather_tokens(expanded.contiguous(), idx))


def test_gather_gradient_is_a_scatter_of_copies():
    x = torch.randn(2, 9, 4, requires_grad=True)
    idx = make_sample(2, 9, 5).visible_idx
    upstream = torch.randn(2, 5, 4)
    ops.gather_tokens(x, idx).backward(upstream)
    expected = torch.zeros(2, 9, 4).scatter(1, idx[..., None].expand(-1, -1, 4), upstream)
    assert torch.equal(x.grad, expected)


def concat_oracle(visible, mask_token, pos, sample):
    rows = []
    for b in range(visible.shape[0]):
        table = pos if pos.ndim == 2 else pos[min(b, pos.shape[0] - 1)]
        rows.append(
            torch.stack(
                [visible[b, k] + table[i] for k, i in enumerate(sample.visible_idx[b])]
                + [mask_token.flatten() + table[i] for i in sample.masked_idx[b]]
            )
        )
    return torch.stack(rows)


@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 5), st.sampled_from(["table", "one", "each"]))
def test_assemble_both_orders(batch, tokens, width, kind):
    sample = make_sample(batch, tokens, max(1, tokens // 2))
    visible = torch.randn(batch, sample.num_visible, width, dtype=torch.float64)
    mask_token = torch.randn(1, 1, width, dtype=torch.float64)
    pos = pos_of(kind, batch, tokens, width)
    expected = concat_oracle(visible, mask_token, pos, sample)
    assert torch.equal(ops.assemble_tokens(visible, mask_token, pos, sample), expected)
    restored = ops.assemble_tokens(visible, mask_token, pos, sample, order="restore")
    token_idx = torch.cat([sample.visible_idx, sample.masked_idx], 1)
    for b in range(batch):
        for place, token in enumerate(token_idx[b].tolist()):
            assert torch.equal(restored[b, token], expected[b, place])


@given(st.integers(2, 12), st.sampled_from(["concat", "restore"]))
def test_gather_after_assemble_is_the_identity(tokens, order):
    sample = make_sample(2, tokens, max(1, tokens // 2))
    visible = torch.randn(2, sample.num_visible, 3)
    full = ops.assemble_tokens(visible, torch.zeros(3), torch.zeros(tokens, 3), sample, order=order)
    back = full[:, : sample.num_visible] if order == "concat" else ops.gather_tokens(full, sample.visible_idx)
    assert torch.equal(back, visible)


@pytest.mark.parametrize("order", ["concat", "restore"])
def test_gradients_of_gather_and_assemble(order):
    sample = make_sample(2, 7, 3)
    visible = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask_token = torch.randn(4, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, m, p: ops.assemble_tokens(v, m, p, sample, order), (visible, mask_token, pos)
    )
    assert torch.autograd.gradcheck(lambda t, p: ops.gather_tokens(t, sample.visible_idx, p), (x, pos))


@given(sizes, sizes, sizes, sizes, sizes, sizes, st.sampled_from([1, 3, 4]))
def test_patchify_layout_and_inverse(t, h, w, tubelet, p1, p2, channels):
    video = torch.rand(2, channels, t * tubelet, h * p1, w * p2)
    patches = ops.patchify(video, (p1, p2), tubelet)
    assert patches.shape == (2, t * h * w, tubelet * p1 * p2 * channels)
    assert torch.equal(ops.unpatchify(patches, (t, h, w), (p1, p2), tubelet), video)
    # Two values by hand, in the layout (t p1 p2 c): the very last, and the last channel of a token's first pixel.
    assert patches[1, -1, -1] == video[1, -1, -1, -1, -1]
    token = (t - 1) * h * w
    assert patches[0, token, channels - 1] == video[0, channels - 1, (t - 1) * tubelet, 0, 0]


def error_oracle(prediction, video, masked_idx, kind, normalize, patch, tubelet):
    """The errors token by token in fp64, from slices of the video."""
    batch, channels, _, height, width = video.shape
    pixels = video.double() / 255 if video.dtype == torch.uint8 else video.double()
    errors = torch.zeros(masked_idx.shape, dtype=torch.float64)
    per_row, per_frame = width // patch, (height // patch) * (width // patch)
    for b in range(batch):
        for m, token in enumerate(masked_idx[b].tolist()):
            t, rest = divmod(token, per_frame)
            h, w = divmod(rest, per_row)
            block = pixels[
                b, :, t * tubelet : (t + 1) * tubelet, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch
            ]
            flat = block.permute(1, 2, 3, 0).reshape(-1, channels)  # (t p1 p2), c
            if normalize:
                flat = (flat - flat.mean(0)) / (flat.std(0, correction=1) + 1e-6)
            difference = prediction[b, m].double() - flat.reshape(-1)
            errors[b, m] = (difference**2).mean() if kind == "mse" else difference.abs().mean()
    return errors


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("video_dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize(("patch", "tubelet", "channels"), [(4, 2, 3), (3, 1, 1), (5, 3, 4)])
def test_reconstruction_error_against_the_oracle(kind, normalize, video_dtype, patch, tubelet, channels):
    video = torch.rand(2, channels, 2 * tubelet, 2 * patch, 3 * patch)
    video = (video * 255).to(torch.uint8) if video_dtype == torch.uint8 else video.to(video_dtype)
    sample = make_sample(2, 12, 5)
    prediction = torch.randn(2, 7, tubelet * patch * patch * channels)
    got = ops.reconstruction_error(
        prediction, video, sample.masked_idx, kind=kind, normalize=normalize, patch_size=patch, tubelet_size=tubelet
    )
    expected = error_oracle(prediction, video, sample.masked_idx, kind, normalize, patch, tubelet)
    assert got.dtype == (torch.float64 if video_dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-6)


def test_mean_and_std_turn_a_normalised_video_back_into_pixels():
    pixels = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    video = (pixels / 255 - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    sizes = {"patch_size": 4, "tubelet_size": 2}
    for normalize in (True, False):
        got = ops.reconstruction_target(video, normalize=normalize, mean=mean, std=std, **sizes)
        torch.testing.assert_close(
            got, ops.reconstruction_target(pixels, normalize=normalize, **sizes), atol=1e-4, rtol=1e-4
        )


def test_constant_patch_has_a_finite_target():
    target = ops.reconstruction_target(torch.full((1, 3, 2, 16, 16), 0.7))
    assert target.isfinite().all()
    assert target.abs().max() < 1


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_gradients_of_the_error(kind):
    video, idx = torch.rand(2, 1, 2, 4, 4, dtype=torch.float64), make_sample(2, 4, 1).masked_idx
    prediction = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    call = lambda x: ops.reconstruction_error(x, video, idx, kind=kind, patch_size=2, tubelet_size=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, prediction)


def test_half_precision_prediction_gives_fp32_error_and_half_gradient():
    video, idx = torch.rand(1, 3, 2, 32, 32), make_sample(1, 4, 1).masked_idx
    prediction = torch.randn(1, 3, 1536, dtype=torch.bfloat16, requires_grad=True)
    error = ops.reconstruction_error(prediction, video, idx)
    assert error.dtype == torch.float32
    error.sum().backward()
    assert prediction.grad.dtype == torch.bfloat16


def test_sampling_loss_is_the_official_loop():
    probs = torch.randn(3, 20).softmax(1)
    sample = make_sample(3, 20, 4)
    error = torch.rand(3, 16)
    clips = []
    for b in range(3):
        log_p = torch.distributions.Categorical(probs=probs[b]).log_prob(torch.arange(20))
        clips.append(-(log_p[sample.mask[b]] * error[b]).mean())
    torch.testing.assert_close(ops.sampling_loss(probs.log(), sample.masked_idx, error), torch.stack(clips).mean())


def test_sampling_loss_clamps_where_the_official_categorical_does():
    probs = torch.tensor([[1 - 2e-9, 1e-9, 1e-9]])
    idx, error = torch.tensor([[0, 1]]), torch.tensor([[1.0, 1.0]])
    log_p = torch.distributions.Categorical(probs=probs[0]).log_prob(torch.tensor([0, 1]))
    torch.testing.assert_close(ops.sampling_loss(probs.log(), idx, error), -log_p.mean())
    assert ops.sampling_loss(torch.tensor([[math.nan, -1.0, -1.0]]), idx, error).isnan()


def test_sampling_loss_gradients_reach_log_probs_alone():
    log_probs = torch.randn(2, 6, dtype=torch.float64).log_softmax(1).requires_grad_()
    error = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    idx = make_sample(2, 6, 2).masked_idx
    assert torch.autograd.gradcheck(lambda x: ops.sampling_loss(x, idx, error.detach()), log_probs)
    ops.sampling_loss(log_probs, idx, error).backward()
    assert log_probs.grad is not None
    assert error.grad is None


def test_bad_input():
    x, idx, pos = torch.zeros(2, 6, 4), torch.arange(3).repeat(2, 1), torch.zeros(6, 4)
    sample = make_sample(2, 6, 3)
    video, prediction = torch.zeros(2, 3, 4, 16, 16), torch.zeros(2, 3, 96)
    cases = [
        (TypeError, r"idx has dtype torch.int32", lambda: ops.gather_tokens(x, idx.int())),
        (ValueError, r"idx has shape \(3,\), expected \[2, K\]", lambda: ops.gather_tokens(x, idx[0])),
        (
            ValueError,
            r"idx holds 1..6, expected indices within 0..5",
            lambda: ops.gather_tokens(x, idx.index_fill(1, idx[0, :1], 6)),
        ),
        (ValueError, r"idx is on meta, expected cpu", lambda: ops.gather_tokens(x, idx.to("meta"))),
        (ValueError, r"x has shape \(6, 4\), expected \[B, N, D\]", lambda: ops.gather_tokens(x[0], idx)),
        (
            ValueError,
            r"pos has shape \(5, 4\), expected \[6, 4\], \[1, 6, 4\] or \[2, 6, 4\]",
            lambda: ops.gather_tokens(x, idx, pos[:5]),
        ),
        (ValueError, "pos is on meta", lambda: ops.gather_tokens(x, idx, pos.to("meta"))),
        (TypeError, "pos has dtype torch.int64", lambda: ops.gather_tokens(x, idx, pos.long())),
        (ValueError, "mask_token is on meta", lambda: ops.assemble_tokens(x[:, :3], pos[0].to("meta"), pos, sample)),
        (ValueError, "error is on meta", lambda: ops.sampling_loss(x[..., 0], idx, x[:, :3, 0].to("meta"))),
        (ValueError, "prediction is on meta", lambda: ops.reconstruction_error(prediction.to("meta"), video, idx)),
        (
            ValueError,
            "visible holds 2 tokens, expected 3",
            lambda: ops.assemble_tokens(x[:, :2], pos[0], pos, sample),
        ),
        (ValueError, "expected 4 values", lambda: ops.assemble_tokens(x[:, :3], pos, pos, sample)),
        (
            ValueError,
            "order='sorted', expected 'concat'",
            lambda: ops.assemble_tokens(x[:, :3], pos[0], pos, sample, order="sorted"),
        ),
        (ValueError, r"video has shape \(3, 4, 16, 16\), expected \[B, C, T, H, W\]", lambda: ops.patchify(video[0])),
        (ValueError, "video has 4 frames, which tubelet_size=3 does not divide", lambda: ops.patchify(video, 16, 3)),
        (ValueError, "frames are 16x16, which patches of 5x5 do not divide", lambda: ops.patchify(video, 5)),
        (ValueError, r"expected \[B, 8, P\] for the grid", lambda: ops.unpatchify(torch.zeros(1, 7, 96), (2, 2, 2), 4)),
        (TypeError, "expected uint8 pixels or floating point", lambda: ops.reconstruction_target(video.int())),
        (
            ValueError,
            "one pixel has no standard deviation",
            lambda: ops.reconstruction_target(video, patch_size=1, tubelet_size=1),
        ),
        (ValueError, "expected both or neither", lambda: ops.reconstruction_target(video, mean=(0.5,) * 3)),
        (
            ValueError,
            "mean has 1 values, std 1, the video 3",
            lambda: ops.reconstruction_target(video, mean=(0.5,), std=(0.5,)),
        ),
        (
            ValueError,
            "its values are pixels already",
            lambda: ops.reconstruction_target(video.byte(), mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        (
            ValueError,
            r"prediction has shape \(2, 3, 96\), expected \(2, 3, 1536\)",
            lambda: ops.reconstruction_error(prediction, video[..., :32].repeat(1, 1, 2, 2, 2), idx),
        ),
        (ValueError, "kind='huber'", lambda: ops.reconstruction_error(prediction, video, idx, kind="huber")),
        (
            ValueError,
            r"error has shape \(2, 2\), expected \(2, 3\)",
            lambda: ops.sampling_loss(x[..., 0], idx, x[:, :2, 0]),
        ),
    ]
    cases += [
        (TypeError, "idx is a boolean mask, expected int64 indices", lambda: ops.gather_tokens(x, sample.mask)),
        (TypeError, "idx is MaskSample, expected a tensor", lambda: ops.gather_tokens(x, sample)),
        (TypeError, "x is ndarray, expected a tensor", lambda: ops.gather_tokens(x.numpy(), idx)),
        (
            ValueError,
            "names 2 different tokens with 3 indices in row 0",
            lambda: ops.gather_tokens(x, idx.clamp(max=1)),
        ),
        (TypeError, "sample is Tensor, expected a MaskSample", lambda: ops.assemble_tokens(x[:, :3], pos[0], pos, idx)),
        (
            ValueError,
            "together names 5 different tokens with 6 indices",
            lambda: ops.assemble_tokens(
                x[:, :3], pos[0], pos, MaskSample(idx, torch.tensor([[2, 3, 4]] * 2), sample.mask)
            ),
        ),
        (TypeError, "mask_token is float", lambda: ops.assemble_tokens(x[:, :3], 0.0, pos, sample)),
        (TypeError, "pos is NoneType", lambda: ops.assemble_tokens(x[:, :3], pos[0], None, sample)),
        (TypeError, "log_probs is None", lambda: ops.sampling_loss(None, idx, x[:, :3, 0])),
        (TypeError, "num_visible=3.0, expected a whole number", lambda: ops.draw_mask(x[..., 0], 3.0)),
        (ValueError, "expected positive whole numbers", lambda: ops.patchify(video, -8)),
        (ValueError, "expected positive whole numbers", lambda: ops.patchify(video, 8, 0)),
        (
            ValueError,
            r"patch_size=\(1, 8, 8\), expected a whole number, or a pair",
            lambda: ops.patchify(video, (1, 8, 8)),
        ),
        (ValueError, r"images.unsqueeze\(2\) and tubelet_size=1", lambda: ops.patchify(video[:, :, 0])),
        (TypeError, "video is ndarray", lambda: ops.reconstruction_error(prediction, video.numpy(), idx)),
        (ValueError, r"masked_idx has shape \(3,\)", lambda: ops.reconstruction_error(prediction, video, idx[0])),
        (TypeError, "expected lists or tuples", lambda: ops.reconstruction_target(video, mean=0.5, std=0.5)),
        (
            ValueError,
            r"std=\(0.0, 0.0, 0.0\), expected positive",
            lambda: ops.reconstruction_target(video, mean=(0.5,) * 3, std=(0.0,) * 3),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_ops_compile_without_graph_breaks():
    sample = make_sample(2, 8, 2)
    tokens, video = torch.randn(2, 8, 4, requires_grad=True), torch.rand(2, 3, 4, 8, 8)
    pos, prediction = torch.randn(1, 8, 4), torch.randn(2, 6, 96, requires_grad=True)

    def step(tokens, video, prediction):
        x = ops.gather_tokens(tokens, sample.visible_idx, pos)
        x = ops.assemble_tokens(x, pos[0, 0], pos, sample, order="restore")
        error = ops.reconstruction_error(
            prediction, video, sample.masked_idx, patch_size=4, mean=(0.5,) * 3, std=(0.2,) * 3
        )
        return x.sum() + error.mean() + ops.sampling_loss(tokens[..., 0], sample.masked_idx, error)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, video, prediction), step(tokens, video, prediction))


def test_samples_pass_through_functions_that_know_only_tuples():
    sample = make_sample(2, 8, 2)
    mapped = torch.utils._pytree.tree_map(lambda x: None if x is None else x.clone(), sample)
    assert isinstance(mapped, MaskSample)
    assert torch.equal(mapped.visible_idx, sample.visible_idx)
