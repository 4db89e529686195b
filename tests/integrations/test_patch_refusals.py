"""Models, arguments and calls that `patch` and patched hosts refuse. A refusal leaves the model unchanged."""

import importlib
from functools import partial
from unittest import mock

import pytest
import torch
from host_checks import each_host, grid_of, snapshot_of
from hosts import (
    CASES,
    checkout,
    make_hiera,
    make_mae,
    make_mae_st,
    make_videomae,
)
from torch import nn
from torch.nn import functional as F

from adamae_sampler import (
    AdaptiveTokenSampler,
    RandomTokenSampler,
    TubeTokenSampler,
    patch,
    unpatch,
)
from adamae_sampler.integrations import HOSTS, HostInterfaceError


@each_host
def test_evaluation_without_a_mask_is_an_error(case):
    model = patch(case.make().eval(), 0.75)
    with pytest.raises(ValueError, match=r"evaluation mode and got no mask.*mask = model\.draw_mask\(inputs\)"):
        model(case.inputs())


@each_host
def test_ratios_that_the_host_cannot_take(case):
    model = case.make()
    before = snapshot_of(model)
    with pytest.raises(ValueError, match="leaves 0 of"):
        patch(model, 0.9999)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        patch(model, 0.0)
    grid = grid_of(model)
    with pytest.raises(ValueError, match="grid_size"):
        patch(model, sampler=RandomTokenSampler((grid[0], grid[1], grid[2] + 1), 0.5))
    with pytest.raises(ValueError, match=r"draws 2 masks of each clip, and .* takes one"):
        patch(model, sampler=RandomTokenSampler(grid, 0.5, num_masks=2))
    with pytest.raises(ValueError, match=r"target_ratio=0\.2, and .* decodes all masked tokens"):
        patch(model, sampler=AdaptiveTokenSampler(1, grid, 0.5, "mlp", target_ratio=0.2))
    with pytest.raises(ValueError, match="not both"):
        patch(model, 0.5, sampler=RandomTokenSampler(grid, 0.5))
    assert snapshot_of(model) == before


def test_patching_again_with_the_other_mlp_is_an_error():
    model = patch(make_mae().train(), network="mlp_linear")
    assert patch(model, network="mlp_linear") is model
    for other in ("mlp", "mha"):
        with pytest.raises(ValueError, match=f"network='{other}' instead of 'mlp_linear'"):
            patch(model, network=other)


def test_a_call_with_another_ratio_is_an_error():
    model = patch(make_mae().train(), 0.75)
    x = torch.randn(2, 3, 32, 32)
    model(x, mask_ratio=0.75)
    model(x, 0.75)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.9, but the model was patched for 0\.75"):
        model(x, mask_ratio=0.9)


def test_the_ratio_is_the_hosts_own_if_none_is_given():
    ratios = {case.name: patch(case.make()).sampler.mask_ratio for case in CASES}
    assert ratios == {
        "hf_videomae": 0.95, "hf_vit_mae": 0.75, "hf_hiera": 0.6, "mae": 0.75, "mae_st": 0.75, "videomae": 0.95, "videomae_v2": 0.95,
        "audiomae": 0.8, "audiomae 2d": 1 - 100 / 512 if checkout("AudioMAE") else 1 - 12 / 64, "pixio": 0.75, "hiera": 0.6, "hiera video": 0.6, "prithvi": 0.75, "monai": 0.75,
    }  # fmt: skip


def test_models_that_are_not_hosts():
    with pytest.raises(TypeError, match=r"cannot patch .*Linear: expected one of HieraForPreTraining, .*host="):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a model \(nn.Module\) to patch, got str"):
        patch("videomae")
    with pytest.raises(TypeError, match=r"it wraps a MaskedAutoencoderViT\. Patch that first, then wrap it"):
        patch(nn.DataParallel(make_mae()))
    with pytest.raises(TypeError, match="It wraps a MaskedAutoencoderViT: unpatch that"):
        unpatch(nn.DataParallel(patch(make_mae())))
    with pytest.raises(ValueError, match="host='vit', expected one of hf_videomae"):
        patch(make_mae(), host="vit")
    with pytest.raises(
        HostInterfaceError, match=r"looked for the method random_masking\(x, mask_ratio\), found nothing"
    ):
        patch(nn.Linear(2, 2), host="mae")


def broken(make, **attributes):
    """A host whose class has changed."""
    model = make()
    model.__class__ = type(type(model).__name__, (type(model),), attributes)
    return model


def test_a_host_whose_interface_has_changed_is_named_and_left_alone():
    changed = {
        r"random_masking\(x, mask_ratio\), found random_masking\(tokens, ratio\)": broken(
            make_mae, random_masking=lambda self, tokens, ratio: None
        ),
        "looked for the method forward_loss.* found a int": broken(make_mae, forward_loss=3),
        r"forward\(x, mask\), found forward\(video\)": broken(make_videomae, forward=lambda self, video: None),
        "expected to be a mean over tokens weighted by the mask": broken(
            make_mae, forward_loss=lambda self, imgs, pred, mask: pred.mean() + mask.bool().sum()
        ),
        "expected to take imgs .* and raised RuntimeError: no such image": broken(make_mae, patchify=_raise),
        "decoder predicts 4 frames": _with(make_mae_st(), t_pred_patch_size=2),
        "attributes that the patch would hide: sampler": _with(make_mae(), sampler=1),
        "would hide: draw_mask, scored": broken(make_hiera, draw_mask=None, scored=lambda self: 1),
    }
    for message, model in changed.items():
        before = snapshot_of(model)
        with pytest.raises(HostInterfaceError, match=message):
            patch(model)
        assert snapshot_of(model) == before


def _plus(term):
    """mae's loss and a term."""
    return lambda self, imgs, pred, mask: type(make_mae()).forward_loss(self, imgs, pred, mask) + term(self, imgs, pred)


def _mean_of(error):
    """A mean of other errors of the pixels."""
    return lambda self, imgs, pred, mask: (error(pred, self.patchify(imgs)).mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    "term",
    [
        lambda self, imgs, pred: 25.0,
        lambda self, imgs, pred: imgs.square().mean(),
        lambda self, imgs, pred: 0.1 * pred.square().mean(),
        lambda self, imgs, pred: 0.01 * sum(each.square().sum() for each in self.parameters()),
    ],
    ids=["constant", "of the input", "of all predictions", "of the weights"],
)
def test_a_loss_with_another_term_is_refused(term):
    model = broken(make_mae, forward_loss=_plus(term))
    before = snapshot_of(model)
    with pytest.raises(HostInterfaceError, match="weighted by the mask, without other terms"):
        patch(model)
    assert snapshot_of(model) == before


@pytest.mark.parametrize(
    "error", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, lambda *both, **how: 3 * F.huber_loss(*both, **how)]
)
def test_a_mean_of_other_errors_is_taken(error):
    model = patch(broken(make_mae, forward_loss=_mean_of(partial(error, reduction="none"))).train())
    model(torch.randn(2, 3, 32, 32))[0].backward()


def charbonnier(one, other, reduction):
    return ((one - other).square() + 1e-6).sqrt()  # not quite 0 where both are equal


def test_an_error_that_is_nearly_zero_for_a_perfect_prediction_is_taken():
    patch(broken(make_mae, forward_loss=_mean_of(partial(charbonnier, reduction="none"))))


def test_whatever_a_hosts_loss_raises_is_named():
    model = broken(make_mae, forward_loss=lambda self, imgs, pred, mask, weights: 0.0)
    with pytest.raises(HostInterfaceError, match=r"raised TypeError: .* missing 1 required positional argument"):
        patch(model)


def _raise(self, imgs):
    raise RuntimeError("no such image")


def _with(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_a_forward_that_no_longer_calls_the_tokenizer():
    model = patch(broken(make_videomae, forward=lambda self, x, mask: x), 0.75).train()
    with pytest.raises(HostInterfaceError, match=r"expected to call encoder\.patch_embed, and did not"):
        model(torch.randn(1, 3, 16, 32, 32))
    model = patch(make_mae().train())
    with pytest.raises(HostInterfaceError, match="called by itself, without a mask"):
        model.forward_encoder(torch.randn(1, 3, 32, 32), 0.75)


@each_host
def test_a_failure_on_the_way_leaves_the_model_as_it_was(case):
    model = case.make()
    before = snapshot_of(model)
    sampler = RandomTokenSampler(grid_of(model), 0.5)
    with mock.patch.object(sampler, "to", side_effect=MemoryError("no room")), pytest.raises(MemoryError):
        patch(model, sampler=sampler)
    assert snapshot_of(model) == before


@each_host
def test_an_error_in_the_forward_leaves_nothing_behind(case):
    model = patch(case.make().train(), 0.75)
    x = case.inputs()
    name = next(name for name, each in model.named_modules() if "decoder" in name and isinstance(each, nn.LayerNorm))
    handle = model.get_submodule(name).register_forward_pre_hook(mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    tensors = [value for each in model.modules() for key, value in vars(each).items() if key in ("_use", "_kept")]
    assert all(each is None for each in tensors)
    case.loss(model(x), x).backward()


@pytest.mark.parametrize(
    ("old", "new"), [("seams", "expected_interface"), ("parts", "patched_submodules"), ("describe", "host_shape")]
)
def test_mixins_with_old_names_are_told_the_new_ones(old, new):
    with pytest.raises(TypeError, match=rf"Mine\.{old} is now called {new}"):
        type("Mine", (HOSTS["mae"],), {old: {}})


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("integrations.host", "HandedOnTokens", "CachedTokenizer"),
        ("integrations.host", "Part", "PatchedSubmodule"),
        ("integrations.host", "SeamError", "HostInterfaceError"),
        ("integrations", "SeamError", "HostInterfaceError"),
    ],
)
def test_imports_of_old_classes_name_the_new_ones(module, old, new):
    with pytest.raises(ImportError, match=rf"{module}\.{old} is now called {new}"):
        exec(f"from adamae_sampler.{module} import {old}")
    found = importlib.import_module(f"adamae_sampler.{module}")
    assert hasattr(found, new)
    assert not hasattr(found, "NoSuchName")


def test_samplers_with_an_old_method_are_told_the_new_one():
    with pytest.raises(TypeError, match=r"Mine\.describe is now called complete"):
        type("Mine", (TubeTokenSampler,), {"describe": None})
