"""Helpers of the tests of patched hosts: parametrization, equality, snapshots, and oracles of the hosts' errors."""

import copy
import inspect
import math

import pytest
import torch
from einops import rearrange
from hosts import (
    CASES,
    HostCase,
    random_sample,
)

from adamae_sampler import (
    unpatch,
)
from adamae_sampler.integrations.patching import find_host

each_host = pytest.mark.parametrize("case", CASES, ids=repr)
each_size = pytest.mark.parametrize(
    ("case", "options", "shape"),
    [(case, options, shape) for case in CASES for options, shape in (({}, case.shape), *case.sizes)],
    ids=lambda value: repr(value) if isinstance(value, HostCase) else None,
)
MASK_GIVEN = "got a mask in training"


def grid_of(model):
    return tuple(find_host(model).host_shape(model).grid_size)


def sample_for(model, clips=2, ratio=0.75, seed=0):
    tokens = math.prod(grid_of(model))
    return random_sample(clips, tokens, round(tokens * (1 - ratio)), seed)


def model_computes_loss(model):
    return find_host(model).computes_loss


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def snapshot_of(model):
    """Every trace that patching could leave on a model: modules, attributes, methods, weights' names, configuration."""
    config = getattr(model, "config", None)
    modules = []
    for name, each in model.named_modules():
        attributes = {key: list(value) if isinstance(value, dict) else id(value) for key, value in vars(each).items()}
        modules.append((name, type(each), attributes, each.forward.__func__, inspect.signature(each.forward)))
    return modules, list(model.state_dict()), config.to_dict() if hasattr(config, "to_dict") else dict(config or {})


def unpatched(model):
    return unpatch(copy.deepcopy(model))


def errors_of_mae(model, x, outputs):
    """[B, N]: the host's own loss with one token masked at a time."""
    _, pred, mask = outputs
    return torch.stack([
        torch.stack([
            type(model).host_class.forward_loss(model, x[clip : clip + 1], pred[clip : clip + 1], one[None])
            for one in torch.eye(mask.shape[1])
        ])
        for clip in range(len(x))
    ])  # fmt: skip


def errors_of_hf_videomae(model, x, outputs):
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    patches = rearrange(x * std + mean, "b (t u) c (h p) (w q) -> b (t h w) (u p q) c", u=2, p=8, q=8)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.std(2, keepdim=True) + 1e-6)
    errors = torch.zeros(target.shape[:2])
    mask = model.last_step.sample.mask
    predicted = rearrange(outputs[1], "b m (v c) -> (b m) v c", c=3)
    errors[mask] = (predicted - target[mask]).square().mean((1, 2))
    return errors


def errors_of_vit_mae(model, x, outputs):
    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return (outputs[1] - target).square().mean(2)


def errors_of_hiera(model, x, outputs):
    """[B, units]: the mean error of each masked unit, by a loop over its predictions."""
    _, pred, label, kept = outputs
    units, positions = model.mask_spatial_shape, model.tokens_spatial_shape_final
    sizes = [position // unit for position, unit in zip(positions, units, strict=True)]
    each = iter((pred - label).square().mean(1))
    errors = torch.zeros(len(x), *units)
    for clip in range(len(x)):
        for position in torch.cartesian_prod(*(torch.arange(size) for size in positions)):
            unit = tuple(int(p) // size for p, size in zip(position, sizes, strict=True))
            if not kept[clip].view(*units)[unit]:
                errors[clip][unit] += next(each) / math.prod(sizes)
    return errors.flatten(1)


def errors_of_hf_hiera(model, x, outputs):
    """[B, units]: the mean error of each unit's predictions, patch by patch."""
    side, units = model.pred_stride, model.hiera.embeddings.patch_embeddings.mask_spatial_shape
    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    errors = (outputs[1] - target).square().mean(2)
    inside = x.shape[2] // side // units[0]
    return rearrange(errors, "b (u i v j) -> b (u v) (i j)", u=units[0], v=units[1], i=inside, j=inside).mean(2)


def errors_of_prithvi(model, x, outputs):
    """[B, N], from the picture that the host makes of its prediction."""
    target, predicted = (
        rearrange(each, "b c (t s) (h p) (w q) -> b (t h w) (s p q c)", s=1, p=8, q=8) for each in (x, outputs[1])
    )
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    return (predicted - target).square().mean(2)


def errors_of_audiomae(model, x, outputs):
    patches = rearrange(x, "b 1 (h p) (w q) -> b (h w) (p q)", p=4, q=4)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    return (outputs[1] - target).square().mean(2)


ERRORS = {
    "mae": errors_of_mae,
    "mae_st": errors_of_mae,
    "audiomae": errors_of_audiomae,
    "audiomae 2d": errors_of_audiomae,
    "hf_videomae": errors_of_hf_videomae,
    "hf_vit_mae": errors_of_vit_mae,
    "hf_hiera": errors_of_hf_hiera,
    "hiera": errors_of_hiera,
    "hiera video": errors_of_hiera,
    "prithvi": errors_of_prithvi,
}
