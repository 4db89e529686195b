import copy
import inspect
import io
import math
import pickle
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import small_hosts
import torch
import torch.distributed as dist
from einops import rearrange
from hosts import (
    CASES,
    HostCase,
    make_hf_videomae,
    make_hf_vit_mae,
    make_hiera,
    make_mae,
    make_mae_st,
    make_videomae,
    make_videomae_v2,
    noise_of,
    random_sample,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import adamae_sampler
from adamae_sampler import (
    AdaMAELoss,
    AdaptiveTokenSampler,
    FrameTokenSampler,
    RandomTokenSampler,
    TubeTokenSampler,
    ops,
    patch,
    unpatch,
)
from adamae_sampler.integrations import HOSTS, SeamError
from adamae_sampler.integrations.host import HandedOnTokens, Patched
from adamae_sampler.integrations.indexed_mask import SUPPORTED, IndexedMask, indexed_mask
from adamae_sampler.integrations.patching import find_host
from adamae_sampler.networks import MLPScoreNetwork

each_host = pytest.mark.parametrize("case", CASES, ids=repr)
each_size = pytest.mark.parametrize(
    ("case", "options", "shape"),
    [(case, options, shape) for case in CASES for options, shape in (({}, case.shape), *case.sizes)],
    ids=lambda value: repr(value) if isinstance(value, HostCase) else None,
)
MASK_GIVEN = "got a mask in training"


def grid_of(model):
    return tuple(find_host(model).describe(model).grid_size)


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
    """Everything that could show that a model was patched once."""
    config = getattr(model, "config", None)
    modules = []
    for name, each in model.named_modules():
        attributes = {key: list(value) if isinstance(value, dict) else id(value) for key, value in vars(each).items()}
        modules.append((name, type(each), attributes, each.forward.__func__, inspect.signature(each.forward)))
    return modules, list(model.state_dict()), config.to_dict() if hasattr(config, "to_dict") else dict(config or {})


# ---- identity ----


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
    patch(model, 0.75, sampling_weight=0.5 if model_computes_loss(model) else None)
    with pytest.warns(UserWarning, match=MASK_GIVEN):
        outputs = case.comparable(model(x, **{case.mask_argument: sample}))
    if len(outputs) == 1:  # VideoMAE leaves the loss to its engine
        assert_equal(outputs, host_outputs)
        return
    assert_equal(outputs[1:], host_outputs[1:])
    step = model.last_step
    assert torch.equal(step.reconstruction, host_outputs[0])
    assert step.sampling > 0
    torch.testing.assert_close(outputs[0], step.reconstruction + 0.5 * step.sampling)


def errors_of_mae(model, x, outputs):
    """[B, N]: the host's own loss of one token at a time."""
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
    """[B, units]: a loop over mask units and the predictions in them."""
    _, pred, label, kept = outputs
    units, places = model.mask_spatial_shape, model.tokens_spatial_shape_final
    sizes = [place // unit for place, unit in zip(places, units, strict=True)]
    each = iter((pred - label).square().mean(1))
    errors = torch.zeros(len(x), *units)
    for clip in range(len(x)):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in places)):
            unit = tuple(int(p) // size for p, size in zip(place, sizes, strict=True))
            if not kept[clip].view(*units)[unit]:
                errors[clip][unit] += next(each) / math.prod(sizes)
    return errors.flatten(1)


ERRORS = {
    "mae": errors_of_mae,
    "mae_st": errors_of_mae,
    "hf_videomae": errors_of_hf_videomae,
    "hf_vit_mae": errors_of_vit_mae,
    "hiera": errors_of_hiera,
    "hiera video": errors_of_hiera,
}


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
            assert not each.grad.any()  # a gradient, of zeros: DDP finds every parameter used
    assert heavy["sampler.network.head.weight"].abs().max() > 1


# ---- training ----


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
    noise = difference.std() / math.sqrt(len(difference))
    assert difference.abs().max() > 0  # the masks did differ
    assert difference.mean().abs() < 4 * noise + 1e-3, (difference.mean(), noise)
    assert difference.mean().abs() < 0.02 * own.mean()


def entropy(model, case):
    with torch.no_grad():
        log_probs = model.eval().draw_mask(case.inputs(8, seed=1000)).log_probs
    model.train()
    return -(log_probs.exp() * log_probs).sum(1).mean()


@each_host
def test_it_trains_and_p_leaves_uniform(case):
    model = patch(case.make().train(), 0.75)
    nn.init.zeros_(model.sampler.network.head.weight)  # p starts uniform
    uniform = math.log(math.prod(grid_of(model)))
    assert entropy(model, case).item() == pytest.approx(uniform, abs=1e-5)
    history = losses(model, case, 30, lambda model, x: case.loss(model(x), x), lr=1e-2)
    assert history[-5:].mean() < 0.97 * history[:5].mean()
    assert entropy(model, case) < uniform - 1e-3
    missing = [name for name, each in model.sampler.named_parameters() if each.grad is None]
    assert not missing
    # What only shifts all scores has no gradient beyond rounding; all else has.
    flat = [name for name, each in model.sampler.named_parameters() if not each.grad.any()]
    assert set(flat) <= {"network.head.bias"}


# ---- patching and taking back ----


@each_host
def test_unpatch_restores_everything(case):
    model = case.make()
    before = snapshot_of(model)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    assert unpatch(patch(model)) is model
    assert snapshot_of(model) == before
    patch(model, 0.5).train()
    x = case.inputs()
    case.loss(model(x), x).backward()
    own_attributes = set(vars(model))
    unpatch(model)
    left = {"patch_info"}  # mae_st's own, of its forward
    assert set(vars(model)) - left == own_attributes - {"sampling_weight", "last_step", "_sample", "_settings"} - left
    assert [each[1] for each in snapshot_of(model)[0]] == [each[1] for each in before[0]]
    assert snapshot_of(model)[1:] == before[1:]
    assert_equal(list(model.state_dict().values()), list(weights.values()))


@each_host
def test_only_the_instance_is_patched(case):
    first, second = case.make(), case.make()
    before, class_before = snapshot_of(second), dict(vars(type(second)))
    patch(first)
    assert snapshot_of(second) == before
    assert dict(vars(type(second))) == class_before
    assert isinstance(first, type(second))
    assert type(first).__name__ == type(second).__name__
    assert not hasattr(second, "sampler")


@each_host
def test_patching_twice_is_patching_once(case):
    model = patch(case.make(), 0.75)
    before = snapshot_of(model)
    assert patch(model, 0.75) is model
    assert patch(model) is model
    assert snapshot_of(model) == before
    for other, message in (
        ({"mask_ratio": 0.5}, "mask_ratio=0.5, where it has 0.75"),
        ({"network": "mlp"}, "network='mlp', where it has 'MHAScoreNetwork'"),
        ({"sampling_weight": 1.0}, "sampling_weight=1.0, where it has 0.0001"),
        ({"sampler": RandomTokenSampler(grid_of(unpatched(model)), 0.75)}, "where it has AdaptiveTokenSampler"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(model, **other)
    assert snapshot_of(model) == before
    unpatch(model)
    with pytest.raises(TypeError, match="is not patched"):
        unpatch(model)


def unpatched(model):
    return unpatch(copy.deepcopy(model))


@each_host
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_too_and_independent(case, way):
    model = patch(case.make().train(), 0.75)
    x = case.inputs()
    case.loss(model(x), x).backward()  # a step has left its traces
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        copied = patch(case.make().train(), 0.75)
        file.seek(0)
        copied.load_state_dict(torch.load(file, weights_only=True))
    assert type(copied) is type(model)
    assert [type(each) for each in copied.modules()] == [type(each) for each in model.modules()]
    sample = sample_for(unpatched(model))
    outputs = [case.comparable(each.eval()(x, **{case.mask_argument: sample})) for each in (model, copied)]
    assert_equal(*outputs)
    unpatch(copied)
    model(x, **{case.mask_argument: sample})
    assert copied.state_dict().keys() == case.make().state_dict().keys()


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "hiera video"], ids=repr)
def test_compile(case):
    model = patch(case.make().train(), 0.75)
    x = case.inputs()
    # hiera and mae_st break graphs unpatched too; torch 2.6 does at each context manager
    fullgraph = SUPPORTED and case.name not in ("hiera", "mae_st")
    sample = sample_for(unpatched(model))
    compiled = torch.compile(model, backend="aot_eager" if fullgraph else "eager", fullgraph=fullgraph)
    for _ in range(2):
        loss = case.loss(compiled(x), x)
    loss.backward()
    assert all(each.grad is not None for each in model.sampler.parameters())
    assert model.last_step.sample.mask.sum(1).tolist() == [sample.masked_idx.shape[1]] * 2
    model.eval()
    expected = case.comparable(model(x, **{case.mask_argument: sample}))
    got = case.comparable(compiled(x, **{case.mask_argument: sample}))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_host
def test_ddp_finds_every_parameter_used(case, request):
    model = patch(case.make().train(), 0.75)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    wrapped = nn.parallel.DistributedDataParallel(model)
    unused = {name for name, each in model.named_parameters() if not each.requires_grad}
    x = case.inputs()
    for _ in range(2):  # the second step fails if a parameter of the first had no gradient
        case.loss(wrapped(x), x).backward()
    assert {name for name, each in model.named_parameters() if each.grad is None} == unused


@each_host
@pytest.mark.parametrize("kind", [RandomTokenSampler, TubeTokenSampler, FrameTokenSampler])
def test_fixed_samplers(case, kind):
    grid = grid_of(model := case.make().train())
    if kind is FrameTokenSampler and grid[0] == 1:
        return
    sampler = kind(grid, 0.5)
    patch(model, sampler=sampler)
    x = case.inputs()
    loss = case.loss(model(x), x)
    loss.backward()
    assert model.last_step.sample.num_visible == sampler.num_visible
    if model.last_step.reconstruction is not None:
        assert loss.item() == model.last_step.reconstruction.item()


@each_host
def test_the_sampler_has_the_models_dtype_and_mode(case):
    model = patch(case.make().to(torch.float64).eval(), 0.75)
    assert {each.dtype for each in model.sampler.parameters()} == {torch.float64}
    assert not model.sampler.training
    x = case.inputs().double()
    model(x, **{case.mask_argument: model.draw_mask(x)})


@each_host
def test_draw_mask_gives_what_evaluation_needs(case):
    model = patch(case.make().eval(), 0.75)
    x = case.inputs()
    sample = model.draw_mask(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample.mask, model.draw_mask(x, generator=torch.Generator().manual_seed(1)).mask)
    first, second = (case.comparable(model(x, **{case.mask_argument: sample})) for _ in range(2))
    assert_equal(first, second)


# ---- errors ----


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
    with pytest.raises(ValueError, match="not both"):
        patch(model, 0.5, sampler=RandomTokenSampler(grid, 0.5))
    assert snapshot_of(model) == before


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
        "hf_videomae": 0.95, "hf_vit_mae": 0.75, "mae": 0.75, "mae_st": 0.75, "videomae": 0.95, "videomae_v2": 0.95,
        "hiera": 0.6, "hiera video": 0.6,
    }  # fmt: skip


def test_models_that_are_no_hosts():
    with pytest.raises(TypeError, match=r"cannot patch .*Linear: expected one of MaskedAutoencoderHiera, .*host="):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a model \(nn.Module\) to patch, got str"):
        patch("videomae")
    with pytest.raises(TypeError, match=r"it wraps a MaskedAutoencoderViT\. Patch that first, then wrap it"):
        patch(nn.DataParallel(make_mae()))
    with pytest.raises(TypeError, match="It wraps a MaskedAutoencoderViT: unpatch that"):
        unpatch(nn.DataParallel(patch(make_mae())))
    with pytest.raises(ValueError, match="host='vit', expected one of hf_videomae"):
        patch(make_mae(), host="vit")
    with pytest.raises(SeamError, match=r"looked for the method random_masking\(x, mask_ratio\), found nothing"):
        patch(nn.Linear(2, 2), host="mae")


def broken(make, **attributes):
    """A host whose class has changed."""
    model = make()
    model.__class__ = type(type(model).__name__, (type(model),), attributes)
    return model


def test_a_host_whose_seam_has_changed_is_named_and_left_alone():
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
        "attributes of its own that the patch would hide: sampler": _with(make_mae(), sampler=1),
        "would hide: draw_mask, scored": broken(make_hiera, draw_mask=None, scored=lambda self: 1),
    }
    for message, model in changed.items():
        before = snapshot_of(model)
        with pytest.raises(SeamError, match=message):
            patch(model)
        assert snapshot_of(model) == before


def _raise(self, imgs):
    raise RuntimeError("no such image")


def _with(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def test_a_forward_that_no_longer_uses_the_seam():
    model = patch(broken(make_videomae, forward=lambda self, x, mask: x), 0.75).train()
    with pytest.raises(SeamError, match=r"expected to call encoder\.patch_embed, and did not"):
        model(torch.randn(1, 3, 16, 32, 32))
    model = patch(make_mae().train())
    with pytest.raises(SeamError, match="called by itself, without a mask"):
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
    tensors = [value for each in model.modules() for key, value in vars(each).items() if key in ("_sample", "_tokens")]
    assert all(each is None for each in tensors)
    case.loss(model(x), x).backward()


# ---- particulars ----


def test_a_fork_that_renamed_its_class_names_its_host():
    class OurMAE(type(make_mae())):
        pass

    model = make_mae()
    model.__class__ = OurMAE
    patch(model)  # a subclass is recognised
    unpatch(model)
    body = {name: value for name, value in vars(small_hosts.MaskedAutoencoderViT).items() if name != "__dict__"}
    renamed = small_hosts.MaskedAutoencoderViT()
    renamed.__class__ = type("Renamed", (nn.Module,), body)
    with pytest.raises(TypeError, match="Renamed: expected one of"):
        patch(renamed)
    assert patch(renamed, host="mae").sampler.num_tokens == 64


def test_networks_of_ones_own():
    network = MLPScoreNetwork(32)
    assert patch(make_mae(), network=network).sampler.network is network
    assert isinstance(patch(make_mae(), network="mlp").sampler.network, MLPScoreNetwork)


def test_videomae_leaves_the_score_networks_positions_out_of_weight_decay():
    model = make_videomae()
    host = set(model.no_weight_decay())
    patch(model)
    assert model.no_weight_decay() == host | {"sampler.network.pos_embed"}
    assert dict(model.named_parameters())["sampler.network.pos_embed"].ndim == 3


def test_videomae_v2_keeps_its_decoder_mask():
    model = make_videomae_v2().eval()
    x = torch.randn(2, 3, 16, 32, 32)
    sample = random_sample(2, 128, 32)
    decode_mask = random_sample(2, 128, 64, seed=1).mask
    expected = model(x, sample.mask, decode_mask)
    patch(model, 0.75)
    prediction, got = model(x, sample, decode_mask=decode_mask)
    assert torch.equal(prediction, expected)
    assert torch.equal(got.mask, sample.mask)

    out = AdaMAELoss(patch_size=8)(prediction, x, got, decode_mask=decode_mask)
    patches = rearrange(x, "b c (t u) (h p) (w q) -> b (t h w) (u p q) c", u=2, p=8, q=8)
    target = (patches - patches.mean(2, keepdim=True)) / (patches.std(2, keepdim=True) + 1e-6)
    errors, terms = [], []
    for clip in range(2):
        decoded = (~decode_mask[clip]).nonzero().flatten().tolist()
        for place, token in enumerate(decoded):
            if sample.mask[clip, token]:
                error = (prediction[clip, place] - target[clip, token].flatten()).square().mean()
                errors.append(error)
                terms.append(-got.log_probs[clip, token] * error.detach())
    torch.testing.assert_close(out.reconstruction, torch.stack(errors).mean())
    torch.testing.assert_close(out.sampling, torch.stack(terms).mean())
    out.loss.backward()
    assert all(each.grad is not None for each in model.sampler.parameters())


def test_the_decoders_mask_must_fit():
    model = patch(make_videomae_v2().train(), 0.75)
    x = torch.randn(2, 3, 16, 32, 32)
    decode_mask = random_sample(2, 128, 64, seed=1).mask
    prediction, sample = model(x, decode_mask=decode_mask)
    with pytest.raises(ValueError, match="decode_mask has shape"):
        AdaMAELoss(patch_size=8)(prediction, x, sample, decode_mask=decode_mask[:, 1:])
    with pytest.raises(ValueError, match="leaves 64 tokens visible in row 0, expected 60"):
        AdaMAELoss(patch_size=8)(prediction[:, :60], x, sample, decode_mask=decode_mask)


@pytest.mark.parametrize("make", [make_videomae, make_videomae_v2])
def test_activation_checkpointing_gives_the_same_step(make):
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    flagged = make(checkpointing=True)
    x, sample = torch.randn(2, 3, 16, 32, 32), random_sample(2, 128, 32)
    grads = []
    for model in (plain, flagged):
        torch.manual_seed(1)
        prediction, drawn = patch(model, 0.75).eval()(x, sample)
        AdaMAELoss(patch_size=8)(prediction, x, drawn).loss.backward()
        grads.append([each.grad for name, each in model.named_parameters() if "sampler" not in name])
    assert_equal(*grads)


@pytest.mark.skipif(not SUPPORTED, reason="needs torch 2.11; before it, hosts get the plain mask")
def test_indexed_masks_index_as_boolean_ones():
    sample = random_sample(3, 20, 5)
    mask = indexed_mask(sample)
    x = torch.randn(3, 20, 4, requires_grad=True)
    assert isinstance(mask, IndexedMask)
    assert torch.equal(x[mask].flatten(0, 1), x[sample.mask])
    assert torch.equal(x[~mask].flatten(0, 1), x[~sample.mask])
    assert torch.equal(x[~~mask].flatten(0, 1), x[sample.mask])
    assert x[~mask].shape == (3, 5, 4)
    assert torch.equal(mask.sum(1), sample.mask.sum(1))
    assert torch.equal(mask.float(), sample.mask.float())
    assert torch.equal(mask & sample.mask, sample.mask)
    assert torch.equal(mask[1], sample.mask[1])
    assert type(sample.mask) is torch.Tensor
    grads = [torch.autograd.grad((x[each].sin() ** 2).sum(), x)[0] for each in (mask, sample.mask)]
    assert torch.equal(*grads)


def test_every_host_is_tested():
    assert {case.name.split(" ")[0] for case in CASES} == set(HOSTS)
    assert adamae_sampler.patch is patch
    assert adamae_sampler.unpatch is unpatch


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6's fully_shard needs a GPU")
def test_what_fsdp_makes_of_a_patched_model_is_not_torn_apart(request):
    from torch.distributed.fsdp import fully_shard

    model = patch(make_mae().train())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(torch.randn(2, 3, 32, 32))[0].backward()
    assert all(each.grad is not None for each in model.sampler.parameters())
    with pytest.raises(
        TypeError, match="something else has changed the class or the forward of this MaskedAutoencoderViT"
    ):
        unpatch(model)


def test_the_readmes_new_host_works(monkeypatch):
    class YourMAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_dim, self.grid_size = 32, (4, 4, 4)
            self.patch_embed = small_hosts.VideoEmbed(32, 8, 3, 32, 8, 2, flat=True)
            self.head = nn.Linear(32, 1)

        def forward(self, video, mask):
            x = self.patch_embed(video)
            visible = x[~mask].reshape(len(x), -1, 32).mean(1, keepdim=True)
            prediction = self.head(x[mask].reshape(len(x), -1, 32) + visible)
            error = (prediction - 1).square().mean(-1)
            return error.mean(), prediction, error

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    start = readme.index("from adamae_sampler import ops\nfrom adamae_sampler.integrations.host import")
    space = {"nn": nn}
    exec(readme[start : readme.index("```", start)], space)
    monkeypatch.setitem(HOSTS, "your_mae", space["AdaptiveYourMAE"])
    model = patch(YourMAE(), 0.75)
    loss, _ = model(torch.randn(2, 3, 8, 32, 32))
    loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    assert model.last_step.sampling > 0
    assert type(unpatch(model)) is YourMAE


def test_a_mixin_with_a_misspelt_part_changes_nothing(monkeypatch):
    class Misspelt(HOSTS["mae"]):
        parts = {"patch_embedding": HandedOnTokens}  # noqa: RUF012

    monkeypatch.setitem(HOSTS, "mae", Misspelt)
    model = make_mae()
    before = snapshot_of(model)
    with pytest.raises(SeamError, match="looked for the submodule patch_embedding, found nothing"):
        patch(model)
    assert snapshot_of(model) == before


def test_arguments_that_a_fork_added_are_passed_on():
    seen = []

    def forward(self, imgs, mask_ratio=0.75, temperature=1.0):
        seen.append(temperature)
        return small_hosts.MaskedAutoencoderViT.forward(self, imgs, mask_ratio)

    model = small_hosts.MaskedAutoencoderViT()
    model.__class__ = type("MaskedAutoencoderViT", (small_hosts.MaskedAutoencoderViT,), {"forward": forward})
    patch(model).train()
    model(torch.randn(2, 3, 32, 32), temperature=0.5)
    assert seen == [0.5]


# ---- what users do to models ----


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
    with pytest.warns(UserWarning, match="another tensor than it got itself"):
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


def test_forwards_of_an_instance_are_refused_both_ways():
    model = make_mae()
    model.forward = partial(model.forward)  # as Accelerate does for mixed precision, or torch.compile(model.forward)
    before = vars(model).copy()
    with pytest.raises(SeamError, match=r"the model has a forward of its own.*Patch first, then wrap"):
        patch(model)
    assert vars(model) == before
    del model.forward
    model.patch_embed.forward = partial(model.patch_embed.forward)
    with pytest.raises(SeamError, match="patch_embed has a forward of its own"):
        patch(model)
    del model.patch_embed.forward
    patch(model).forward = partial(model.forward)
    with pytest.raises(TypeError, match=r"has changed the class or the forward.*Undo that first"):
        unpatch(model)
    del model.forward
    unpatch(model)
    torch.nn.utils.parametrize.register_parametrization(model, "cls_token", nn.Identity())
    with pytest.raises(SeamError, match="a parametrization"):
        patch(model)


def test_a_forward_within_a_forward_is_refused():
    model = patch(make_mae().train())
    x = torch.randn(1, 3, 32, 32)
    model.decoder_norm.register_forward_hook(lambda *_: model(x))
    with pytest.raises(RuntimeError, match="is under way, in another thread or from within"):
        model(x)


def test_parts_that_are_wrapped_afterwards():
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


def test_parts_that_are_replaced_afterwards():
    model = patch(make_mae().train())
    model.patch_embed = make_mae().patch_embed
    with pytest.raises(SeamError, match=r"patch_embed of this patched .* was replaced by a .* that is not patched"):
        model(torch.randn(1, 3, 32, 32))
    unpatch(model)
    patch(model)(torch.randn(1, 3, 32, 32))


def test_embeddings_that_are_recomputed_without_their_mask_are_refused():
    model = patch(make_hf_vit_mae().train())
    model.vit.embeddings = checkpoint_wrapper(model.vit.embeddings)
    loss = model(torch.randn(2, 3, 32, 32)).loss
    with pytest.raises(RuntimeError, match="Recomputed values"):  # torch's, since ours recomputes nothing
        loss.backward()


def test_models_that_share_a_tokenizer():
    first, second = make_mae(), make_mae()
    second.patch_embed = first.patch_embed
    patch(first)
    with pytest.raises(SeamError, match="patch_embed is part of another patched model"):
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
    """log p is clamped as torch's Categorical does, in every host."""

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
    with pytest.raises(SeamError, match="on the meta device"):
        patch(model)


def test_a_loss_of_its_own_is_the_hosts():
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


def test_arguments_that_are_none():
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
    with pytest.raises(ValueError, match="taken as Hiera's, True = kept, so inverted; then: mask leaves 10"):
        hiera(torch.randn(1, 3, 128, 128), mask=random_sample(1, 16, 6).mask)


@pytest.mark.skipif(not SUPPORTED, reason="needs torch 2.11; before it, hosts get the plain mask")
def test_indexed_masks_do_not_change_in_place():
    mask = indexed_mask(random_sample(2, 20, 5))
    for change in (lambda: mask.logical_not_(), lambda: mask.__setitem__(0, True)):
        with pytest.raises(TypeError, match="would change this mask and not its indices"):
            change()
