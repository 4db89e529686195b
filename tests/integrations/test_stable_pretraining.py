"""stable-pretraining's MAE, the library's own files, with a learned mask in its slot."""

import copy
import pickle

import pytest
import torch
from einops import rearrange
from hosts import random_sample
from make_hosts import make_stable_pretraining
from torch.nn.parallel import DistributedDataParallel

from adamae_sampler import AdaptiveTokenSampler, HardTokenSampler, RandomTokenSampler, patch, unpatch
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.stable_pretraining import AdaptiveMasking, adaptive_mae, random_mae
from adamae_sampler.sampler import TokenSampler

GRID = (1, 4, 4)


class Given(TokenSampler):
    """Gives one mask."""

    def __init__(self, sample):
        super().__init__(GRID, 0.75)
        self.num_visible, self.sample = sample.num_visible, sample

    def draw(self, tokens, generator, *, grid_size=None):
        return self.sample

    def complete(self, tokens, given, video=None, grid_size=None):
        return given


class Plain(torch.nn.Module):
    """A masking written against the library's documentation."""

    def __init__(self, sample):
        super().__init__()
        self.sample = sample

    def forward(self, x, grid_h, grid_w):
        visible = x.gather(1, self.sample.visible_idx[..., None].expand(-1, -1, x.shape[2]))
        from stable_pretraining.backbone.patch_masking import MaskingOutput

        return MaskingOutput(visible=visible, mask=self.sample.mask.float(), ids_keep=self.sample.visible_idx)


def images(clips=2, seed=0):
    return torch.randn(clips, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def errors(predictions, x):
    """[B, N], against normalised targets whose channels come first."""
    target = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=8, q=8)
    target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    return (predictions - target).square().mean(2)


def gradients(model):
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("vit", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_a_given_mask_gives_the_librarys_outputs_bit_for_bit(vit):
    sample = random_sample(2, 16, 4)
    torch.manual_seed(0)
    plain = make_stable_pretraining(vit, masking=Plain(sample)).train()
    torch.manual_seed(0)
    model = adaptive_mae(make_stable_pretraining(vit).train(), sampler=Given(sample))
    expected, output = plain(images()), model(images())
    for name in ("loss", "predictions", "mask"):
        assert torch.equal(output[name], expected[name])
    expected.loss.backward()
    output.loss.backward()
    wanted = gradients(plain)
    assert gradients(model).keys() == wanted.keys()
    assert all(torch.equal(each, wanted[name]) for name, each in gradients(model).items())


@pytest.mark.parametrize("network", ["mha", "pooled"])
def test_the_sampler_learns_from_the_errors_that_the_loss_averages(network):
    model = adaptive_mae(make_stable_pretraining().train(), network=network, sampling_weight=0.5)
    assert model.masking.sampler.mask_ratio == 0.75
    x = images()
    torch.testing.assert_close(
        model.masking.sampler(torch.randn(2, 16, 32)).log_probs.exp(), torch.full((2, 16), 1 / 16)
    )  # random masks at first
    torch.nn.init.normal_(model.masking.sampler.network.head.weight, std=0.1)
    output = model(x)
    step = model.masking.last_step
    masked, error = step.sample.mask, errors(output.predictions.detach(), x)
    assert torch.equal(output.mask, masked.float())
    assert masked.sum(1).tolist() == [12, 12]
    torch.testing.assert_close(step.reconstruction, error[masked].mean())
    torch.testing.assert_close(step.sampling, -(step.sample.log_probs * error)[masked].mean())
    torch.testing.assert_close(output.loss.detach(), step.reconstruction + 0.5 * step.sampling)
    output.loss.backward()
    of_decoder = model.decoder
    before = {name: each.grad.clone() for name, each in of_decoder.named_parameters() if each.grad is not None}
    assert all(each.grad is not None for each in model.masking.parameters())
    model.masking.sampling_weight = 0.0
    model.zero_grad()
    model.masking.sampler.draw = Given(step.sample).draw  # the same mask
    model(x).loss.backward()
    assert all(torch.equal(each.grad, before[name]) for name, each in of_decoder.named_parameters() if name in before)


def test_training_changes_p():
    model = adaptive_mae(make_stable_pretraining().train(), sampling_weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = images(16)
    x[:, :, :, :16] = 0.5  # the left half has no texture, and its error stays 0
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        losses.append(float(model.masking.last_step.reconstruction))
    assert sum(losses[-5:]) < sum(losses[:5])
    p = model.masking.last_step.sample.log_probs.exp().view(16, 4, 4).mean((0, 1))
    assert p[2:].sum() > 2 * p[:2].sum()


def test_the_slot_takes_the_masking_when_the_model_is_made():
    masking = AdaptiveMasking(AdaptiveTokenSampler(32, GRID, 0.5), sampling_weight=1.0)
    model = adaptive_mae(make_stable_pretraining(masking=masking).train())
    assert model.masking is model.encoder.masking is masking
    assert model(images()).num_visible == 8
    assert masking.last_step.sampling is not None
    with pytest.raises(ValueError, match="has a sampler already"):
        adaptive_mae(random_mae(model), 0.75)


def test_evaluation_is_the_librarys():
    torch.manual_seed(0)
    plain = make_stable_pretraining().eval()
    model = adaptive_mae(copy.deepcopy(plain)).eval()
    assert torch.equal(model(images()).predictions, plain(images()).predictions)
    assert model(images()).loss == 0


def test_undoing_restores_the_model():
    model = make_stable_pretraining().train()
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    adaptive_mae(model)(images()).loss.backward()
    assert random_mae(model) is model
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    model(images()).loss.backward()
    with pytest.raises(TypeError, match="no learned mask"):
        random_mae(model)


def test_copies_and_files():
    model = adaptive_mae(make_stable_pretraining().train())
    model(images()).loss.backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(images()).loss.backward()
        assert other.masking is other.encoder.masking
        assert other.masking is not model.masking
    fresh = adaptive_mae(make_stable_pretraining().train())
    fresh.load_state_dict(model.state_dict())
    for one, two in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert "masking.sampler.network.head.weight" in model.state_dict()


def test_ddp_finds_every_parameter_used(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(adaptive_mae(make_stable_pretraining().train()))
        for _ in range(2):
            model(images()).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_it_compiles_with_the_librarys_graph_breaks():
    """Its loss and its output read values back, so there is no single graph, with or without the learned mask."""
    model = adaptive_mae(make_stable_pretraining().train(), sampler=Given(random_sample(2, 16, 4)))
    expected = model(images()).loss
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(images()).loss, expected)


@pytest.mark.parametrize("loss_type", ["mse", "smooth_l1", "cosine"])
def test_every_loss_of_the_library_that_is_0_for_a_perfect_prediction(loss_type):
    model = adaptive_mae(make_stable_pretraining(loss_type=loss_type).train())
    model(images()).loss.backward()
    assert model.masking.last_step.sampling > 0


def test_a_loss_that_is_no_mean_over_masked_tokens_is_refused():
    model = make_stable_pretraining().train()
    model.loss_fn.mask_only = False
    with pytest.raises(HostInterfaceError, match="expected to be a mean over tokens weighted by the mask"):
        adaptive_mae(model)
    model.loss_fn.mask_only, model.loss_fn.reduction = True, "sum"
    with pytest.raises(HostInterfaceError, match="expected to be a mean over tokens weighted by the mask"):
        adaptive_mae(model)
    assert not isinstance(model.masking, AdaptiveMasking)


def test_a_loss_of_another_mask_and_a_missing_loss_are_named():
    model = adaptive_mae(make_stable_pretraining().train())
    output = model.encoder(images())
    predictions = torch.randn(2, 16, 192)
    with pytest.raises(HostInterfaceError, match="with another mask than that of its tokens"):
        model.loss_fn(predictions, images(), output.mask.roll(1, 1))
    with pytest.raises(HostInterfaceError, match="no mask drawn for it, or a second loss"):
        model.loss_fn(predictions, images(), output.mask)
    model.encoder(images())
    with pytest.warns(UserWarning, match="no sampling loss computed for the first"):
        model.encoder(images())


def test_tokens_that_do_not_count():
    model, x = adaptive_mae(make_stable_pretraining().train()), images()
    valid = torch.rand(2, 16) < 0.5
    valid[:, :8] = True
    with model.masking.counting(valid):
        output = model(x)
    step = model.masking.last_step
    counted = step.sample.mask & valid
    assert valid.gather(1, step.sample.visible_idx).all()
    torch.testing.assert_close(step.reconstruction, errors(output.predictions.detach(), x)[counted].mean())
    output.loss.backward()
    assert model(x).loss.isfinite()
    assert model.masking.last_step.sample.valid is None


def test_ranks():
    sampler = HardTokenSampler(32, GRID, 0.75, network="mlp")
    model = adaptive_mae(make_stable_pretraining().train(), sampler=sampler)
    model(images()).loss.backward()
    assert model.masking.last_step.sampling > 0
    assert sampler.network.head.weight.grad.any()
    model = adaptive_mae(make_stable_pretraining().train(), sampler=RandomTokenSampler(GRID, 0.75))
    model(images()).loss.backward()
    assert model.masking.last_step.sampling is None


def test_patch_names_the_functions_for_this_library():
    model = make_stable_pretraining()
    with pytest.raises(TypeError, match=r"stable_pretraining\.adaptive_mae"):
        patch(model)
    with pytest.raises(TypeError, match="See random_mae"):
        unpatch(adaptive_mae(model))


def test_bad_input():
    with pytest.raises(HostInterfaceError, match=r"Linear\.masking is a NoneType, expected Module"):
        adaptive_mae(torch.nn.Linear(2, 2))
    model = adaptive_mae(make_stable_pretraining())
    with pytest.raises(ValueError, match="has a learned mask already"):
        adaptive_mae(model)
    with pytest.raises(ValueError, match=r"the sampler's grid_size is \(1, 8, 8\)"):
        adaptive_mae(make_stable_pretraining(), sampler=RandomTokenSampler((1, 8, 8), 0.75))
    with pytest.raises(ValueError, match="give one of the two"):
        adaptive_mae(make_stable_pretraining(), 0.5, sampler=RandomTokenSampler(GRID, 0.75))
    with pytest.raises(ValueError, match=r"Plain has no mask_ratio\. Give adaptive_mae one"):
        adaptive_mae(make_stable_pretraining(masking=Plain(None)))
    with pytest.raises(ValueError, match="num_masks=2, uses_video=False, target_ratio=0; expected 1"):
        AdaptiveMasking(RandomTokenSampler(GRID, 0.75, num_masks=2))
