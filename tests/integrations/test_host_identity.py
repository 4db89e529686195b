"""With a given mask a patched host computes what the host does. With drawn masks it trains."""

import copy
import math

import pytest
import torch
from host_checks import (
    ERRORS,
    MASK_GIVEN,
    assert_equal,
    each_host,
    each_size,
    grid_of,
    model_computes_loss,
    sample_for,
)
from hosts import (
    CASES,
)

from adamae_sampler import (
    RandomTokenSampler,
    patch,
)


@each_size
def test_a_given_mask_gives_the_hosts_outputs_bit_for_bit(case, options, shape):
    model = case.make(**options).eval()
    x = torch.randn(2, *shape)
    sample = sample_for(model)
    expected = case.comparable(case.with_mask(model, x, sample))
    patch(model, 0.75)
    got = model(x, **{case.mask_argument: sample})
    assert_equal(case.comparable(got), expected)
    assert torch.equal(model.last_step.sample.mask, sample.mask)


@each_host
def test_a_boolean_mask_is_taken_too(case):
    model = case.make().eval()
    x, sample = case.inputs(), sample_for(model)
    expected = case.comparable(case.with_mask(model, x, sample))
    patch(model, 0.75)
    mask = ~sample.mask if case.name.startswith("hiera") else sample.mask
    assert_equal(case.comparable(model(x, **{case.mask_argument: mask})), expected)


@each_host
def test_in_training_the_hosts_loss_stays_and_the_sampling_loss_is_added(case):
    model = case.make().train()
    x, sample = case.inputs(), sample_for(model)
    host_outputs = case.comparable(case.with_mask(model, x, sample))
    computes_loss = model_computes_loss(model)
    patch(model, 0.75, sampling_weight=0.5 if computes_loss else None)
    with pytest.warns(UserWarning, match=MASK_GIVEN):
        outputs = case.comparable(model(x, **{case.mask_argument: sample}))
    if not computes_loss:  # its engine does
        assert_equal(outputs, host_outputs)
        return
    assert_equal(outputs[1:], host_outputs[1:])
    step = model.last_step
    assert torch.equal(step.reconstruction, host_outputs[0])
    assert step.sampling > 0
    torch.testing.assert_close(outputs[0], step.reconstruction + 0.5 * step.sampling)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ERRORS], ids=repr)
def test_the_sampling_loss_is_of_the_errors_that_the_hosts_loss_averages(case):
    model = patch(case.make().train(), 0.75)
    x = torch.randn(2, *case.shape)
    outputs = case.comparable(model(x))
    step = model.last_step
    with torch.no_grad():
        errors = ERRORS[case.name](model, x, outputs)
        masked = step.sample.mask.float()
        torch.testing.assert_close((errors * masked).sum() / masked.sum(), step.reconstruction)
        expected = -(step.sample.log_probs * errors * masked).sum() / masked.sum()
    torch.testing.assert_close(step.sampling, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ERRORS], ids=repr)
def test_the_sampling_loss_reaches_the_sampler_and_not_the_prediction(case):
    model = patch(case.make().train(), 0.75, sampling_weight=1e6)
    x = case.inputs()
    seed = torch.get_rng_state()
    case.loss(model(x), x).backward()
    heavy = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    model.sampling_weight = 0.0
    torch.set_rng_state(seed)
    case.loss(model(x), x).backward()
    shared = ("patch_embed", "sampler.")  # the sampling loss reaches the tokenizer, as in the official code
    for name, each in model.named_parameters():
        if each.grad is not None and not any(part in name for part in shared):
            assert torch.equal(each.grad, heavy[name]), name
        if name.startswith("sampler."):
            assert not each.grad.any()  # zeros and not None, so that DDP finds every parameter used
    assert heavy["sampler.network.head.weight"].abs().max() > 1


def losses(model, case, steps, loss_of, lr=1e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for step in range(steps):
        x = case.inputs(4, seed=step)
        loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return torch.tensor(history)


@each_host
def test_with_a_random_sampler_it_trains_as_the_host_does(case):
    host = case.make().train()
    patched = copy.deepcopy(host)
    ratio = {"hiera": 0.6, "hiera video": 0.6}.get(case.name, 0.75)
    patch(patched, sampler=RandomTokenSampler(grid_of(patched), ratio))
    own = losses(host, case, 50, lambda model, x: case.own_loss(model, x, ratio))
    ours = losses(patched, case, 50, lambda model, x: case.loss(model(x), x))
    difference = ours - own
    noise = difference.view(5, 10).mean(1).std() / math.sqrt(5)  # of blocks, since runs drift apart
    assert difference.abs().max() > 0  # their masks differ
    assert difference.mean().abs() < 4 * noise + 1e-3, (difference.mean(), noise)
    assert difference.mean().abs() < 0.02 * own.mean()


def entropy(model, case):
    with torch.no_grad():
        log_probs = model.eval().draw_mask(case.inputs(8, seed=1000)).log_probs
    model.train()
    return -(log_probs.exp() * log_probs).sum(1).mean()


@each_host
@pytest.mark.parametrize("network", ["mha", "mlp", "pooled"])
def test_without_the_sampling_loss_p_stays_uniform(case, network):
    """The control of every claim that p follows the errors."""
    weight = 0.0 if model_computes_loss(case.make()) else None
    model = patch(case.make().train(), 0.75, network=network, sampling_weight=weight)

    def loss_of(model, x):
        output = model(x)
        if weight is None:
            output = output[0], output[1]._replace(log_probs=None)
        return case.loss(output, x)

    losses(model, case, 5, loss_of, lr=1e-2)
    assert entropy(model, case).item() == pytest.approx(math.log(math.prod(grid_of(model))), abs=1e-5)


@each_host
def test_it_trains_and_p_leaves_uniform(case):
    model = patch(case.make().train(), 0.75)  # p starts uniform
    uniform = math.log(math.prod(grid_of(model)))
    assert entropy(model, case).item() == pytest.approx(uniform, abs=1e-5)
    history = losses(model, case, 30, lambda model, x: case.loss(model(x), x), lr=1e-2)
    assert history[-5:].mean() < 0.97 * history[:5].mean()
    assert entropy(model, case) < uniform - 1e-3
    missing = [name for name, each in model.sampler.named_parameters() if each.grad is None]
    assert not missing
    # A bias that shifts all scores alike has no gradient beyond rounding. All other parameters have one.
    flat = [name for name, each in model.sampler.named_parameters() if not each.grad.any()]
    assert set(flat) <= {"network.head.bias"}
