"""Patched hosts with the samplers that look at pixels, follow a ramp or rank errors."""

import pytest
import torch
from host_checks import ERRORS, grid_of
from hosts import CASES

from adamae_sampler import (
    BlockTokenSampler,
    GridTokenSampler,
    HardTokenSampler,
    MotionTokenSampler,
    patch,
    ranking_loss,
)
from adamae_sampler.integrations.indexed_mask import SUPPORTED
from adamae_sampler.integrations.patching import find_host
from adamae_sampler.integrations.token_errors import errors_by_gradient

# The short form takes the Hugging Face host and the one whose loss is a weighted mean; -m "" takes all.
SHORT = ("hf_videomae", "mae", "mae_st")
each_host = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in SHORT else pytest.mark.slow, id=repr(case)) for case in CASES],
)


def hard_sampler(model, ratio=0.5):
    shape = find_host(model).host_shape(model)
    sampler = HardTokenSampler(shape.embed_dim, shape.grid_size, ratio, network="mlp")
    sampler.share.set(5, 10)
    return sampler


def samplers(model):
    grid = grid_of(model)
    yield BlockTokenSampler(grid, 0.5)
    yield GridTokenSampler(grid, 0.5)
    yield hard_sampler(model)
    if grid[0] > 1:
        yield MotionTokenSampler(grid, 0.5)
        yield MotionTokenSampler(grid, 0.5, source="pixels")


@each_host
def test_a_step_with_each_sampler(case):
    for sampler in samplers(case.make()):
        model = patch(case.make().train(), sampler=sampler)
        x = case.inputs()
        loss = case.loss(model(x), x)
        loss.backward()
        last = model.last_step
        assert last.sample.num_visible == sampler.num_visible
        assert all(each.grad is not None and each.grad.isfinite().all() for each in sampler.parameters())
        if last.reconstruction is not None:
            learns = isinstance(sampler, HardTokenSampler)
            assert (last.sampling is not None) == learns
            expected = last.reconstruction + (1e-4 * last.sampling if learns else 0)
            torch.testing.assert_close(loss.detach(), expected)
        model.eval()
        model(x, **{case.mask_argument: model.draw_mask(x)})


@each_host
def test_pixels_reach_the_sampler(case):
    """The token whose pixels change is always drawn."""
    grid = grid_of(model := case.make())
    if grid[0] == 1:
        return
    patch(model.eval(), sampler=MotionTokenSampler(grid, 0.5, source="pixels", floor=1e-3))
    x = torch.zeros(1, *case.shape).expand(20, *case.shape).clone()
    video = model.as_video(x)  # a view
    frames, height, width = (size // each for size, each in zip(video.shape[2:], grid, strict=True))
    video[:, :, -frames:, height : 2 * height, -width:] = 1.0
    changed = ((grid[0] - 1) * grid[1] + 1) * grid[2] + grid[2] - 1
    assert not model.draw_mask(x).mask[:, changed].any()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ERRORS], ids=repr)
def test_errors_are_those_of_the_host(case):
    """The ranking loss is that of errors computed from the host's outputs in another way."""
    model = patch(case.make().train(), sampler=hard_sampler(case.make()))
    x = case.inputs()
    with pytest.MonkeyPatch.context() as context:
        shift = torch.arange(1, model.sampler.num_tokens - model.sampler.num_visible)[:, None]
        context.setattr(torch, "randint", lambda *_, **__: shift)  # every pair, so that nothing is drawn
        output = model(x)
        sample = model.last_step.sample
        errors = ERRORS[case.name](model, x, case.comparable(output))
        expected = ranking_loss(sample, errors.gather(1, sample.masked_idx))
    torch.testing.assert_close(model.last_step.sampling, expected)
    least = sample.difficulty.topk(int(0.25 * sample.masked_idx.shape[1])).values[:, -1:]  # of those hidden for certain
    assert (sample.difficulty.gather(1, sample.visible_idx) <= least).all()  # predictions may be equal


COMPILED = [
    pytest.param(case, marks=() if case.name == "mae" else pytest.mark.slow, id=repr(case))
    for case in CASES
    if case.name in ("hf_videomae", "mae", "videomae")
]


@pytest.mark.skipif(not SUPPORTED, reason="torch before 2.11")
@pytest.mark.parametrize("case", COMPILED)
def test_a_hard_step_compiles_as_one_graph(case):
    model = patch(case.make().train(), sampler=hard_sampler(case.make()))
    x = case.inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    case.loss(model(x), x)
    expected = model.last_step
    model.sampler.share.set(5, 10)
    torch.manual_seed(0)
    case.loss(compiled(x), x).backward()
    assert torch.equal(model.last_step.sample.mask, expected.sample.mask)
    if expected.sampling is not None:
        torch.testing.assert_close(model.last_step.sampling, expected.sampling)
    assert all(each.grad is not None for each in model.sampler.parameters())
    assert model.sampler.share.step == 6


def test_errors_are_minus_the_gradient_of_the_sampling_loss():
    sampler = HardTokenSampler(4, (2, 3, 3), 0.5, network="mlp")
    sample, error = sampler(torch.randn(2, 18, 4)), torch.rand(2, 9)
    found = errors_by_gradient(lambda log_probs: -(log_probs.gather(1, sample.masked_idx) * error).mean(), sample)
    torch.testing.assert_close(found, error)


def test_total_takes_errors_or_a_sampling_loss():
    model = patch(CASES[0].make().train())
    for given in ({}, {"sampling": torch.sum, "token_error": torch.zeros}):
        with (
            pytest.raises(TypeError, match="either sampling or token_error, and got neither or both"),
            model.masking(CASES[0].inputs(), None),
        ):
            model.total(torch.zeros(()), **given)
