"""The kernels as PyTorch operators: registration, autograd, autocast and compilation of a whole training step."""

import pytest
import torch
from conftest import tiny_model
from kernel_inputs import DEVICE, OPS, assert_same, make_sample

from adamae_sampler import AdaMAELoss, MaskSample, ops

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture
def tiny():
    """A step of few tokens, for the interpreter."""
    model = tiny_model(img_size=16, num_frames=4, depth=1, mask_ratio=0.5).eval()
    return model.to(DEVICE), torch.randn(2, 3, 4, 16, 16, device=DEVICE)


def op_calls():
    """{operator: its arguments}, for every registered operator."""
    scores = torch.randn(2, 9, device=DEVICE)
    sample = make_sample(2, 9, 3)
    x = torch.randn(2, 9, 6, device=DEVICE)
    visible, pos = torch.randn(2, 3, 6, device=DEVICE), torch.randn(1, 9, 6, device=DEVICE)
    mask_token = torch.randn(6, device=DEVICE)
    video, prediction = torch.rand(2, 1, 3, 6, 6, device=DEVICE), torch.randn(2, 6, 4, device=DEVICE)
    error, how = torch.rand(2, 6, device=DEVICE), ("mse", True, [1, 2, 2], [0.5], [0.25])
    idx = (sample.visible_idx, sample.masked_idx)
    indices = make_sample(2, 27, 21).masked_idx
    seed = torch.tensor([11, 12], device=DEVICE)
    return {
        "add_norm": (x, x, mask_token, mask_token, 1e-6),
        "add_norm_backward": (x, x, x, mask_token, torch.rand(2, 2, 9, device=DEVICE)),
        "token_scores": (x, mask_token, mask_token[:1]),
        "draw_mask": (scores, 3, None, seed),
        "log_softmax_backward": (scores, scores),
        "gather_tokens": (x, sample.visible_idx, pos),
        "scatter_tokens": (visible, sample.visible_idx, len(visible), 9, torch.float32),
        "scatter_tokens_sum": (visible, sample.visible_idx, 9, torch.bfloat16),
        "assemble_tokens": (visible, mask_token, pos, *idx, True),
        "sum_masked_rows": (x, sample.visible_idx, False),
        "patch_tokens": (video, indices, [1, 2, 2], torch.bfloat16, 0.5),
        "reconstruction_error": (prediction, video, indices, *how, True),
        "head_error": (visible, torch.randn(4, 6, device=DEVICE), None, video, indices[:, :3], None, *how, True, True),
        "thumbnails": (video, [1, 2, 2], [0.5], [0.25], torch.float16),
        "scale_rows": (prediction, error, 0.5),
        "sampling_loss": (scores, sample.masked_idx, error),
        "sampling_loss_backward": (error.sum(), scores, sample.masked_idx, error),
    }


@pytest.mark.parametrize("name", sorted(op_calls()))
def test_registration(name):
    """PyTorch checks the schema, the fake tensors, autograd and tracing."""
    torch.library.opcheck(getattr(OPS, name).default, op_calls()[name])


def test_every_operator_is_checked():
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "adamae_sampler" in name}
    assert registered == set(op_calls())


@pytest.mark.parametrize("name", sorted(op_calls()))
def test_bit_identical_from_run_to_run(name):
    first, second = (getattr(OPS, name)(*op_calls_once) for op_calls_once in [op_calls()[name]] * 2)
    first, second = (each if isinstance(each, tuple) else (each,) for each in (first, second))
    assert_same(first, second)


def losses_and_grads(model, video, sample, loss):
    model.zero_grad()
    prediction, sample = model(video, mask=sample)
    out = loss(prediction, video, sample)
    out.loss.backward()
    return [*out, *(each.grad for each in model.parameters())]


def test_a_training_step_equals_the_references(tiny):
    model, video = tiny
    sample, loss = make_sample(2, 8, 4), AdaMAELoss(patch_size=8, sampling_weight=0.1)
    results = []
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            results.append(losses_and_grads(model, video, sample, loss))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_autocast_leaves_the_ops_as_they_are(tiny):
    model, video = tiny
    sample = make_sample(2, 8, 4)
    with ops.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        prediction, sample = model(video, mask=sample)
        assert prediction.dtype == torch.bfloat16
        out = AdaMAELoss(patch_size=8)(prediction, video, sample)
        assert all(each.dtype == torch.float32 for each in (*out, sample.log_probs))
        out.loss.backward()
    assert all(each.grad.isfinite().all() for each in model.parameters())


def test_a_training_step_compiles_as_one_graph(tiny):
    """Forward and backward pass traced as inductor gets them; what inductor makes of every op is the next test."""
    model, video = tiny
    loss = AdaMAELoss(patch_size=8)

    def forward(video):
        prediction, sample = model(video)
        return loss(prediction, video, sample), sample

    with ops.use_backend("triton"):
        out, sample = torch.compile(forward, fullgraph=True, backend="aot_eager")(video)
        out.loss.backward()
        grads = [each.grad for each in model.parameters()]
        expected = losses_and_grads(model, video, MaskSample(*sample[:3]), loss)
    torch.testing.assert_close([*out], expected[:4], rtol=1e-4, atol=1e-5)
    for got, want in zip(grads, expected[4:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_every_op_of_a_training_step():
    """Without the products and the attention between the ops, which take inductor a minute."""
    video = torch.rand(2, 3, 4, 16, 16, device=DEVICE)
    sizes = {"table": (8, 12), "norm": (12,), "scores": (2, 8), "mask_token": (12,), "head": (384, 12)}
    weights = {name: torch.randn(*size, device=DEVICE, requires_grad=True) for name, size in sizes.items()}
    noise = torch.rand(2, 8, device=DEVICE)

    def step(video, table, norm, scores, mask_token, head):
        sample = ops.draw_mask(scores, 4, noise)
        patches = ops.patch_tokens(video, patch_size=8)[..., :12]
        patches = patches + ops.thumbnails(video, patch_size=8).mean()
        tokens, normed = ops.add_norm(patches, patches, norm, norm)
        weighted = tokens * ops.token_scores(normed, norm, norm[:1])[..., None]
        visible = ops.gather_tokens(weighted, sample.visible_idx, table)
        hidden = ops.assemble_tokens(visible, mask_token, table, sample)[:, 4:]
        reconstruction, _ = ops.head_error(hidden, head, None, video, sample.masked_idx, patch_size=8)
        error = ops.reconstruction_error(hidden @ head.t(), video, sample.masked_idx, patch_size=8)
        return reconstruction + error.mean() + ops.sampling_loss(sample.log_probs, sample.masked_idx, error)

    results = []
    with ops.use_backend("triton"):
        for function in (step, torch.compile(step, fullgraph=True)):
            loss = function(video, **weights)
            results.append([loss, *torch.autograd.grad(loss, list(weights.values()))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
