"""Patched hosts with tokens that do not count."""

import math

import pytest
import torch
from host_checks import ERRORS, grid_of, model_computes_loss
from hosts import CASES
from test_samplers import each_host, hard_sampler

from adamae_sampler import AdaMAELoss, patch
from adamae_sampler.integrations.patching import find_host


def some_valid(model, clips=2):
    """All tokens of the first clip, and enough of the others."""
    num_tokens = math.prod(grid_of(model))
    valid = torch.ones(clips, num_tokens, dtype=torch.bool)
    valid[1:] = torch.rand(clips - 1, num_tokens) < 0.5
    valid[1:, : num_tokens // 2] = True
    return valid


@each_host
def test_a_step_with_invalid_tokens(case):
    model = patch(case.make().train(), 0.75)
    x, valid = case.inputs(), some_valid(model)
    output = model(x, valid=valid)
    loss = case.loss(output, x)
    loss.backward()
    step = model.last_step
    assert valid.gather(1, step.sample.visible_idx).all()
    assert torch.equal(step.sample.valid, valid)
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    counted = step.sample.mask & valid
    if not model_computes_loss(model):
        return
    with torch.no_grad():
        outputs = case.comparable(output)
        if case.name not in ERRORS:  # pixio gives no prediction, and its loss is that of the mask
            return
        errors = ERRORS[case.name](model, x, outputs)
        torch.testing.assert_close((errors * counted).sum() / counted.sum(), step.reconstruction)
        log_probs = step.sample.log_probs.where(valid, 0)
        torch.testing.assert_close(
            step.sampling, -(log_probs * errors * counted).sum() / counted.sum(), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(loss.detach(), step.reconstruction + model.sampling_weight * step.sampling)


@each_host
def test_with_all_tokens_valid_the_loss_is_the_hosts(case):
    model = patch(case.make().train(), 0.75)
    x, results = case.inputs(), []
    for more in ({}, {"valid": torch.ones_like(some_valid(model))}):
        torch.manual_seed(0)
        model.zero_grad()
        loss = case.loss(model(x, **more), x)
        loss.backward()
        gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        results.append([loss.detach(), *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("mae", "mae_st", "hf_vit_mae")], ids=repr)
def test_ranks_are_of_valid_tokens(case):
    model = case.make().train()
    model = patch(model, sampler=hard_sampler(model))
    x, valid = case.inputs(), some_valid(model)
    case.loss(model(x, valid=valid), x).backward()
    step = model.last_step
    assert step.sampling > 0
    assert valid.gather(1, step.sample.visible_idx).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "mae"], ids=repr)
def test_no_data_changes_nothing(case):
    """Neither visible tokens nor targets come from patches that do not count."""
    model = patch(case.make().train(), 0.75, sampling_weight=1.0)
    x, valid = case.inputs(), some_valid(model)
    sides = grid_of(model)[1:]
    pixels = valid.view(2, *sides).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    results = []
    for inputs in (x, x.where(pixels, 7.0)):
        torch.manual_seed(0)
        model.zero_grad()
        model(inputs, valid=valid)[0].backward()
        results.append(
            [model.last_step.reconstruction, model.last_step.sampling, model.patch_embed.proj.weight.grad.clone()]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_for_evaluation_keeps_what_counts():
    (case,) = (each for each in CASES if each.name == "hf_vit_mae")
    model = patch(case.make().eval(), 0.75)
    x, valid = case.inputs(), some_valid(model)
    mask = model.draw_mask(x, valid=valid)
    counted = mask.mask & valid
    output = model(x, mask=mask)
    errors = ERRORS[case.name](model, x, case.comparable(output))
    torch.testing.assert_close(output.loss, (errors * counted).sum() / counted.sum())
    with pytest.raises(ValueError, match="row 1 of valid has 3 valid tokens of 64"):
        model.draw_mask(x, valid=torch.stack([valid[0], torch.arange(64) < 3]))


def test_an_engine_gets_the_tokens_that_count_with_the_sample():
    (case,) = (each for each in CASES if each.name == "videomae")
    model = patch(case.make().train(), 0.75)
    assert not find_host(model).computes_loss
    x, valid = case.inputs(), some_valid(model)
    prediction, sample = model(x, valid=valid)
    out = AdaMAELoss(patch_size=8)(prediction, x, sample)
    assert not out.token_error[~sample.target_valid].any()
    assert out.token_error[sample.target_valid].all()
