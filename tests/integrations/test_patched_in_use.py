"""Patched models in use: hooks, wrappers, subclasses, shared submodules, odd arguments."""

import math
from functools import partial

import pytest
import small_hosts
import torch
from host_checks import ERRORS, MASK_GIVEN, assert_equal, each_host, grid_of, sample_for
from hosts import (
    CASES,
    make_hf_videomae,
    make_hf_vit_mae,
    make_hiera,
    make_mae,
    make_videomae,
    noise_of,
    random_sample,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adamae_sampler import (
    AdaMAELoss,
    AdaptiveTokenSampler,
    TubeTokenSampler,
    ops,
    patch,
    unpatch,
)
from adamae_sampler.integrations import HostInterfaceError
from adamae_sampler.integrations.host import Patched
from adamae_sampler.integrations.indexed_mask import SUPPORTED, indexed_mask
from adamae_sampler.integrations.patching import find_host


def mask_of(model, x):
    return random_sample(len(x), 64, 16)


def test_a_subclass_that_changes_its_input_before_the_tokenizer():
    class Normalising(small_hosts.MaskedAutoencoderViT):
        def forward(self, imgs, mask_ratio=0.75):
            return super().forward((imgs - 0.5) / 0.25, mask_ratio)

    model = Normalising().eval()
    x = torch.rand(2, 3, 32, 32)
    sample = mask_of(model, x)
    with noise_of(sample):
        expected = model(x)
    patch(model)
    with pytest.warns(UserWarning, match="another tensor than the model's input"):
        assert_equal(model(x, mask=sample), expected)


@pytest.mark.parametrize("make", [make_mae, make_hf_videomae])
def test_hooks_on_the_tokenizer_change_tokens_once(make):
    model = make().eval()
    case = next(case for case in CASES if case.make is make)
    name = find_host(model).tokenizer
    model.get_submodule(name).register_forward_hook(lambda module, args, tokens: 2 * tokens)
    x, sample = case.inputs(), sample_for(model)
    expected = case.comparable(case.with_mask(model, x, sample))
    patch(model)
    assert_equal(case.comparable(model(x, mask=sample)), expected)


def test_patch_and_unpatch_refuse_a_forward_set_on_the_instance():
    model = make_mae()
    model.forward = partial(model.forward)  # as Accelerate does for mixed precision, or torch.compile(model.forward)
    before = vars(model).copy()
    with pytest.raises(HostInterfaceError, match=r"the model has a forward of its own.*Patch first, then wrap"):
        patch(model)
    assert vars(model) == before
    del model.forward
    model.patch_embed.forward = partial(model.patch_embed.forward)
    with pytest.raises(HostInterfaceError, match="patch_embed has a forward of its own"):
        patch(model)
    del model.patch_embed.forward
    patch(model).forward = partial(model.forward)
    with pytest.raises(TypeError, match=r"has changed the class or the forward.*Undo that first"):
        unpatch(model)
    del model.forward
    unpatch(model)
    torch.nn.utils.parametrize.register_parametrization(model, "cls_token", nn.Identity())
    with pytest.raises(HostInterfaceError, match="a parametrization"):
        patch(model)


def test_a_forward_within_a_forward_is_refused():
    model = patch(make_mae().train())
    x = torch.randn(1, 3, 32, 32)
    model.decoder_norm.register_forward_hook(lambda *_: model(x))
    with pytest.raises(RuntimeError, match="is under way, in another thread or from within"):
        model(x)


def test_a_submodule_wrapped_after_patching_trains_as_before():
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = patch(make_mae().train())
        if wrap:
            model.patch_embed = checkpoint_wrapper(model.patch_embed)
        torch.manual_seed(1)
        model(x)[0].backward()
        grads.append([each.grad for name, each in model.named_parameters() if each.grad is not None])
    assert_equal(*grads)
    unpatch(model)
    assert not any(isinstance(each, Patched) for each in model.modules())


def test_a_submodule_replaced_after_patching_is_refused():
    model = patch(make_mae().train())
    model.patch_embed = make_mae().patch_embed
    with pytest.raises(
        HostInterfaceError, match=r"patch_embed of this patched .* was replaced by a .* that is not patched"
    ):
        model(torch.randn(1, 3, 32, 32))
    unpatch(model)
    patch(model)(torch.randn(1, 3, 32, 32))


def test_embeddings_that_are_recomputed_without_their_mask_are_refused():
    model = patch(make_hf_vit_mae().train())
    model.vit.embeddings = checkpoint_wrapper(model.vit.embeddings)
    loss = model(torch.randn(2, 3, 32, 32)).loss
    with pytest.raises(RuntimeError, match="Recomputed values"):  # PyTorch's own error, raised before ours
        loss.backward()


def test_models_that_share_a_tokenizer():
    first, second = make_mae(), make_mae()
    second.patch_embed = first.patch_embed
    patch(first)
    with pytest.raises(HostInterfaceError, match="patch_embed belongs to another patched model"):
        patch(second)
    assert isinstance(first.patch_embed, Patched)
    unpatch(first)
    patch(second)


def test_attributes_that_only_look_like_ours_stay():
    model = make_mae()
    model.patch_embed.sampler = nn.Linear(2, 2)
    keys = list(model.state_dict())
    assert list(unpatch(patch(model)).state_dict()) == keys


def test_another_instance_of_a_patched_class_is_a_plain_host():
    model = patch(small_hosts.MaskedAutoencoderViT())
    other = type(model)()
    assert type(other) is type(model).host_class
    other(torch.randn(1, 3, 32, 32))
    patch(other)


@pytest.mark.parametrize(("name", "score"), [("mae", -1000.0), ("mae", 1e4), ("hf_vit_mae", 1e4)])
def test_confident_samplers_have_the_losses_of_the_ops(name, score):
    """Hosts clamp log p like torch.distributions.Categorical."""

    class OneToken(nn.Module):
        def forward(self, tokens):
            return torch.zeros(tokens.shape[:2]).index_fill(1, torch.tensor([3]), score)

    case = next(case for case in CASES if case.name == name)
    model = patch(case.make().train(), 0.75, network=OneToken())
    x = torch.randn(2, *case.shape)
    outputs = case.comparable(model(x))
    step = model.last_step
    with torch.no_grad():
        errors = ERRORS[name](model, x, outputs).gather(1, step.sample.masked_idx)
        expected = ops.sampling_loss(step.sample.log_probs, step.sample.masked_idx, errors)
    torch.testing.assert_close(step.sampling, expected)


def test_half_precision_and_mixed_models():
    patch(make_mae(img_size=160, patch_size=16).half())
    model = make_mae().bfloat16()
    model.mask_token.data = model.mask_token.data.float()
    sampler = patch(model, network="mlp").sampler
    assert {each.dtype for each in sampler.parameters()} == {torch.bfloat16}


@each_host
def test_models_without_weights_are_refused(case):
    model = case.make().to("meta")
    with pytest.raises(HostInterfaceError, match="on the meta device"):
        patch(model)


def test_forward_loss_called_directly_is_the_hosts():
    model = make_mae().train()
    x, pred, mask = torch.randn(2, 3, 32, 32), torch.randn(2, 64, 48), torch.ones(2, 64)
    expected = model.forward_loss(x, pred, mask)
    assert torch.equal(patch(model).forward_loss(x, pred, mask), expected)


def test_the_warning_names_the_callers_line():
    model = patch(make_mae().train())
    x = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match=MASK_GIVEN) as caught:
        model(x, mask=random_sample(2, 64, 16))
    assert caught[0].filename == __file__


def test_bad_arguments():
    model = make_videomae()
    with pytest.raises(TypeError, match=r"sampler is .*TubeTokenSampler.*, expected a TokenSampler"):
        patch(model, sampler=TubeTokenSampler)
    with pytest.raises(TypeError, match=r"mask_ratio='0\.9', expected a number"):
        patch(model, "0.9")
    with pytest.raises(ValueError, match=r"sampling_weight=1\.0 has no use here.*AdaMAELoss"):
        patch(model, sampling_weight=1.0)
    with pytest.raises(ValueError, match=r"embed_dim is 64, but the tokens .* are 32 wide"):
        patch(model, sampler=AdaptiveTokenSampler(64, grid_of(model), 0.9))
    for weight in ("1", -1, math.nan):
        with pytest.raises(ValueError, match="expected a number of at least 0"):
            patch(make_mae(), sampling_weight=weight)
    x = torch.randn(2, 3, 16, 32, 32)
    patch(model, 0.75).train()
    with pytest.raises(TypeError, match="mask is str, expected a bool tensor"):
        model(x, "x")
    ragged = random_sample(2, 128, 32).mask
    ragged[1, ragged[1].nonzero()[0]] = False
    with (
        pytest.raises(ValueError, match="rows leave from 32 to 33"),
        pytest.warns(UserWarning, match=MASK_GIVEN),
    ):
        model(x, ragged)
    prediction, sample = model(x)
    with pytest.raises(TypeError, match="sample is Tensor, expected a MaskSample"):
        AdaMAELoss(patch_size=8)(prediction, x, sample.mask)
    hiera = patch(make_hiera(), 0.6).eval()
    with pytest.raises(ValueError, match="The inverted mask is wrong: mask leaves 10"):
        hiera(torch.randn(1, 3, 128, 128), mask=random_sample(1, 16, 6).mask)


@pytest.mark.skipif(not SUPPORTED, reason="needs torch 2.11; before it, hosts get the plain mask")
def test_indexed_masks_do_not_change_in_place():
    mask = indexed_mask(random_sample(2, 20, 5))
    for change in (lambda: mask.logical_not_(), lambda: mask.__setitem__(0, True)):
        with pytest.raises(TypeError, match="would change this mask and not its indices"):
            change()
