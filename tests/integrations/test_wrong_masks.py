"""Hosts that use another mask than the sampler's, or leave its loss out. Each step is refused by an error that names
what was found, and the model is whole after `unpatch`."""

from functools import partial, wraps
from unittest import mock

import pytest
import small_hosts
import torch
from einops import rearrange
from host_checks import model_computes_loss, snapshot_of
from hosts import CASES, checkout, import_from, make_videomae, random_sample

from adamae_sampler import patch, unpatch
from adamae_sampler.integrations import HostInterfaceError
from adamae_sampler.integrations.indexed_mask import SUPPORTED

MAE = small_hosts.MaskedAutoencoderViT


def changed(model, where="", **attributes):
    """The model, with attributes of one of its modules' class replaced."""
    module = model.get_submodule(where)
    module.__class__ = type(type(module).__name__, (type(module),), attributes)
    return model


def refuses(model, x, message):
    """The patched model refuses the step, twice alike; unpatched it is the model it was."""
    before = snapshot_of(model)
    patch(model.train(), 0.75)
    for _ in range(2):
        with pytest.raises(HostInterfaceError, match=message) as caught:
            model(x)
        assert "unpatch(model)" in str(caught.value)
    unpatch(model)
    assert [each[:2] for each in snapshot_of(model)[0]] == [each[:2] for each in before[0]]
    assert snapshot_of(model)[1:] == before[1:]


def images(clips=2):
    return torch.randn(clips, 3, 32, 32)


# ---- forks of mae ----


class OtherMasks(MAE):
    """A fork that chooses between masks, as AudioMAE and others do."""

    chosen = "random_masking"

    def random_masking_2d(self, x, mask_ratio):
        """Shows the tokens of some rows and columns."""
        side = int(x.shape[1] ** 0.5)
        shown = (torch.randperm(side)[:, None] < side // 2) & (torch.randperm(side) < side // 2)
        order = (~shown).flatten().to(torch.uint8).argsort(stable=True)
        mask = (~shown).flatten().float().expand(x.shape[0], -1)
        return x[:, order[: int(shown.sum())]], mask, order.argsort().expand(x.shape[0], -1)

    def block_masking(self, x, mask_ratio):
        return self.random_masking_2d(x, mask_ratio)

    def forward_encoder(self, x, mask_ratio):
        x, mask, restore, *_ = getattr(self, self.chosen)(self.patch_embed(x) + self.pos_embed[:, 1:], mask_ratio)
        return self.encode(x), mask, restore


@pytest.mark.parametrize("masking", ["random_masking_2d", "block_masking"])
def test_a_fork_that_chooses_another_mask(masking):
    model = OtherMasks()
    patch(model.train())(images())[0].backward()
    unpatch(model).chosen = masking
    refuses(
        model,
        images(),
        r"in random_masking, and did not\..*also has block_masking, random_masking_2d: switch it to random_masking",
    )
    model(images())[0].backward()


def test_a_fork_that_computes_its_loss_in_forward():
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return ((pred - self.target(imgs)).square().mean(-1) * mask).sum() / mask.sum(), pred, mask

    refuses(changed(MAE(), forward=forward), images(), "compute its loss where the patch adds the sampling loss")


def test_a_fork_whose_register_token_is_masked_too():
    def forward_encoder(self, x, mask_ratio):
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], 1)
        x, mask, restore, *_ = self.random_masking(tokens, mask_ratio)
        return self.encode(x), mask, restore

    message = "masked 65 tokens of 2 clips in random_masking, expected 64 of 2.*register token"
    refuses(changed(MAE(), forward_encoder=forward_encoder), images(), message)


def test_a_fork_that_masks_two_views():
    def in_turn(self, imgs, mask_ratio=0.75):
        _, mask, restore = self.forward_encoder(imgs, mask_ratio)
        latent, *_ = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    refuses(changed(MAE(), forward=in_turn), images(), "tokens in random_masking a second time")

    def together(self, x, mask_ratio):
        tokens = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, mask, restore, *_ = self.random_masking(torch.cat([tokens, tokens.flip(1)]), mask_ratio)
        return self.encode(x), mask, restore

    message = "masked 64 tokens of 4 clips in random_masking, expected 64 of 2.*several views"
    refuses(changed(MAE(), forward_encoder=together), images(), message)


def test_a_fork_with_a_schedule_of_ratios():
    def forward_encoder(self, x, mask_ratio):
        return MAE.forward_encoder(self, x, 0.5)

    refuses(changed(MAE(), forward_encoder=forward_encoder), images(), r"mask_ratio=0\.5, expected the patch's 0\.75")


@pytest.mark.parametrize("copy", [torch.clone, lambda mask: mask.to(torch.float64), lambda mask: mask.view(-1, 8, 8)])
def test_a_fork_whose_loss_has_a_copy_of_the_mask(copy):
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, copy(mask).view_as(mask)), pred, mask

    model = patch(changed(MAE(), forward=forward).train())
    compared = mock.Mock(side_effect=torch.equal)
    with mock.patch.object(torch, "equal", compared):
        for _ in range(3):
            model(images())[0].backward()
    assert compared.call_count <= 1  # its class is known to copy from then on


def test_a_part_of_a_host_may_be_compiled():
    model = patch(make_videomae().train(), 0.75)
    model.encoder.compile(backend="eager")
    x = torch.randn(2, 3, 16, 32, 32)
    prediction, sample = model(x)
    assert prediction.shape[:2] == sample.masked_idx.shape


@pytest.mark.parametrize("other", [lambda mask: 1 - mask, torch.ones_like], ids=["inverted", "all tokens"])
def test_a_fork_whose_loss_has_another_mask(other):
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, other(mask)), pred, mask

    refuses(changed(MAE(), forward=forward), images(), "its loss with another mask than that of its tokens")


def test_a_fork_that_computes_its_loss_twice():
    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, mask) + self.forward_loss(imgs, 2 * pred, mask), pred, mask

    refuses(changed(MAE(), forward=forward), images(), "its loss a second time")


def test_an_encoder_that_cuts_visible_tokens_into_regions():
    """MAE-DFER's: with a sampler's mask its own code puts tokens into wrong regions, without an error."""

    def forward(self, x, mask):
        x = self.patch_embed(x) + self.pos_embed
        x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        return rearrange(x, "b (t r s) d -> b (r t s) d", t=8, r=2)

    model = changed(make_videomae(), "encoder", forward=forward)
    model.encoder.attn_type = "local_global"
    before = snapshot_of(model)
    with pytest.raises(HostInterfaceError, match=r"each region must show equally many.*attn_type='joint'"):
        patch(model)
    assert snapshot_of(model) == before
    model.encoder.attn_type = "joint"
    patch(model)


@pytest.mark.skipif(checkout("MAE-DFER") is None, reason="ADAMAE_SAMPLER_HOSTS names no folder with MAE-DFER")
def test_mae_dfer():
    module = import_from(checkout("MAE-DFER"), "modeling_pretrain")

    def make(**options):
        return module.PretrainVisionTransformer(
            img_size=32, patch_size=4, encoder_embed_dim=32, encoder_depth=1, encoder_num_heads=2, decoder_depth=1,
            decoder_num_classes=3 * 2 * 16, decoder_embed_dim=16, decoder_num_heads=2, mlp_ratio=2, **options,
        )  # fmt: skip

    with pytest.raises(HostInterfaceError, match="each region must show equally many"):
        patch(make(attn_type="local_global", lg_region_size=(2, 4, 8)))
    prediction, sample = patch(make().train(), 0.75)(torch.randn(2, 3, 16, 32, 32))
    assert prediction.shape[:2] == sample.masked_idx.shape


# ---- every host, made to use a mask of its own, or to give no loss ----


def overridden(model, where, name, function):
    """The model, one of whose methods runs `function(the method, *its arguments)`."""
    module = model.get_submodule(where)
    own = getattr(type(module), name)

    @wraps(own)
    def method(self, *args, **kwargs):
        return function(partial(own, self), *args, **kwargs)

    return changed(model, where, **{name: method})


def own_mask(mask):
    """A mask that has nothing but its shape from the given one."""
    clips, tokens = mask.shape
    return random_sample(clips, tokens, tokens - int(0.75 * tokens), seed=1).mask


def with_own_mask(host, x, mask=None, *args, **kwargs):
    return host(x, None if mask is None else own_mask(mask), *args, **kwargs)


def with_own_masking(host, *args, method="random_masking", **kwargs):
    module = host.args[0]
    with mock.patch.object(module, method, partial(getattr(type(module).host_class, method), module)):
        return host(*args, **kwargs)


with_own_masking_2d = partial(with_own_masking, method="random_masking_2d")
with_own_masking_of_monai = partial(with_own_masking, method="_masking")


def without_mask(host, x, ratio, mask=None):
    return host(x, ratio)


def without_loss(host, *args, **kwargs):
    output = host(*args, **kwargs)
    if isinstance(output, tuple):
        return None, *output[1:]
    output.loss = None
    return output


def with_a_loss_elsewhere(host, *args, **kwargs):
    with mock.patch.object(host.args[0], "forward_loss", return_value=torch.zeros((), requires_grad=True)):
        return host(*args, **kwargs)


MUTATIONS = [
    ("hf_videomae", "", "forward", with_own_mask),
    ("hf_videomae", "videomae.embeddings", "forward", with_own_mask),
    ("videomae", "", "forward", with_own_mask),
    ("videomae", "encoder", "forward", with_own_mask),
    ("videomae_v2", "", "forward", with_own_mask),
    ("videomae_v2", "encoder", "forward", with_own_mask),
    ("hf_vit_mae", "vit.embeddings", "forward", with_own_masking),
    ("hf_hiera", "hiera.embeddings.patch_embeddings", "forward", with_own_masking),
    ("hf_hiera", "", "forward", without_loss),
    ("mae", "", "forward_encoder", with_own_masking),
    ("mae_st", "", "forward_encoder", with_own_masking),
    ("hiera", "", "forward_encoder", without_mask),
    ("hiera video", "", "forward_encoder", without_mask),
    ("audiomae", "", "forward_encoder", with_own_masking),
    ("audiomae 2d", "", "forward_encoder", with_own_masking_2d),
    ("pixio", "", "forward_encoder", with_own_masking),
    ("prithvi", "encoder", "forward", with_own_masking),
    ("monai", "", "forward", with_own_masking_of_monai),
    ("audiomae", "", "forward", with_a_loss_elsewhere),
    ("audiomae 2d", "", "forward", with_a_loss_elsewhere),
    ("pixio", "", "forward", with_a_loss_elsewhere),
    ("prithvi", "", "forward", with_a_loss_elsewhere),
    ("hf_videomae", "", "forward", without_loss),
    ("hf_vit_mae", "", "forward", without_loss),
    ("mae", "", "forward", with_a_loss_elsewhere),
    ("mae_st", "", "forward", with_a_loss_elsewhere),
    ("hiera", "", "forward", without_loss),
    ("hiera video", "", "forward", without_loss),
]
MASKS = (with_own_mask, with_own_masking, with_own_masking_2d, with_own_masking_of_monai, without_mask)


@pytest.mark.parametrize(("name", "where", "method", "function"), MUTATIONS)
def test_a_host_with_another_mask_or_without_a_loss(name, where, method, function):
    if function is with_own_mask and where and not SUPPORTED:
        pytest.skip("before torch 2.11 hosts get plain masks, which do not tell whether they are used")
    case = next(case for case in CASES if case.name == name)
    model = overridden(case.make(), where, method, function)
    message = "mask its tokens with the sampler's mask" if function in MASKS else "expected to compute (its|a) loss"
    refuses(model, case.inputs(), message)


def test_every_host_has_a_mutation_of_its_mask_and_of_its_loss():
    masks = {name for name, _, _, function in MUTATIONS if function in MASKS}
    losses = {name for name, _, _, function in MUTATIONS if function not in MASKS}
    assert masks == {case.name for case in CASES}
    assert losses == {case.name for case in CASES if model_computes_loss(case.make())}
