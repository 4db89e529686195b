"""Needs of single hosts, hosts that users add, and masks that index."""

from pathlib import Path

import pytest
import small_hosts
import torch
import torch.distributed as dist
from einops import rearrange
from host_checks import assert_equal, each_host, snapshot_of
from hosts import (
    AUDIO,
    CASES,
    make_audiomae,
    make_mae,
    make_videomae,
    make_videomae_v2,
    random_sample,
)
from torch import nn

import adamae_sampler
from adamae_sampler import (
    AdaMAELoss,
    patch,
    unpatch,
)
from adamae_sampler.integrations import HOSTS, HostInterfaceError
from adamae_sampler.integrations.host import CachedTokenizer
from adamae_sampler.integrations.indexed_mask import SUPPORTED, IndexedMask, indexed_mask
from adamae_sampler.networks import MLPScoreNetwork, PooledScoreNetwork


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


def test_a_score_network_may_be_given():
    network = MLPScoreNetwork(32)
    assert patch(make_mae(), network=network).sampler.network is network
    assert isinstance(patch(make_mae(), network="mlp").sampler.network, MLPScoreNetwork)


@each_host
def test_the_pooled_network_learns_in_every_host(case):
    model = patch(case.make().train(), 0.6, network="pooled")
    assert isinstance(model.sampler.network, PooledScoreNetwork)
    x = case.inputs()
    case.loss(model(x), x).backward()
    grads = {name: each.grad for name, each in model.sampler.named_parameters()}
    assert all(each is not None for each in grads.values())
    assert grads["network.head.weight"].abs().sum() > 0


def test_in_a_patched_videomae_the_score_networks_positions_decay():
    """As in the official code: they have three axes, and the host's names do not have them."""
    model = make_videomae()
    names = model.no_weight_decay()
    patch(model)
    assert model.no_weight_decay() == names
    assert dict(model.named_parameters())["sampler.network.pos_embed"].ndim == 3
    assert "sampler.network.pos_embed" not in names


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


def test_audiomae_ignores_a_calls_ratio_where_its_own_code_does():
    model = patch(make_audiomae(mask_2d=True).train())
    model(torch.randn(2, *AUDIO), mask_ratio=0.3)  # as its engine passes it
    with pytest.raises(ValueError, match=r"patched for 0\.8"):
        patch(make_audiomae().train())(torch.randn(2, *AUDIO), mask_ratio=0.3)


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
def test_unpatch_refuses_a_model_that_fsdp_has_sharded(request):
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
            self.encoder = small_hosts.VideoEncoder(32, 8, 3, 32, 1, 8, 2, False)
            self.head = nn.Linear(32, 1)
            self.positions = nn.Parameter(torch.zeros(1, 64, 32))

        def forward(self, video, mask):
            visible = self.encoder(video, mask).mean(1, keepdim=True)
            hidden = self.positions.expand(len(video), -1, -1)[mask].reshape(len(video), -1, 32)
            prediction = self.head(hidden + visible)
            error = (prediction - 1).square().mean(-1)
            return error.mean(), prediction, error

    readme = (Path(__file__).parents[2] / "adamae_sampler" / "integrations" / "README.md").read_text()
    start = readme.index("from adamae_sampler.integrations.host import AdaptiveHost")
    space = {"nn": nn}
    exec(readme[start : readme.index("```", start)], space)
    monkeypatch.setitem(HOSTS, "your_mae", space["AdaptiveYourMAE"])
    model = patch(YourMAE(), 0.75)
    loss, _ = model(torch.randn(2, 3, 8, 32, 32))
    loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    assert model.last_step.sampling > 0
    assert type(unpatch(model)) is YourMAE


def test_a_mixin_with_a_misspelt_submodule_changes_nothing(monkeypatch):
    class Misspelt(HOSTS["mae"]):
        patched_submodules = {"patch_embedding": CachedTokenizer}  # noqa: RUF012

    monkeypatch.setitem(HOSTS, "mae", Misspelt)
    model = make_mae()
    before = snapshot_of(model)
    with pytest.raises(HostInterfaceError, match="looked for the submodule patch_embedding, found nothing"):
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
