"""Options of the reference model beyond the exact method: what each one leaves unchanged, and which are refused."""

import inspect
import math

import pytest
import timm
import torch
from conftest import tiny_model
from torch.nn.functional import avg_pool3d

from adamae_sampler import (
    AdaMAELoss,
    AdaptiveTokenSampler,
    HardTokenSampler,
    MaskSample,
    RandomTokenSampler,
    ops,
)
from adamae_sampler.losses import HeadInputs
from adamae_sampler.models import PRESETS, AdaMAE
from adamae_sampler.networks import MHAScoreNetwork, PooledScoreNetwork
from adamae_sampler.ops import head, patchify

GRID = (4, 4, 4)
FAST = PRESETS["fast"]
CRITERION = AdaMAELoss(patch_size=8)


def clips(batch=2):
    return torch.randn(batch, 3, 8, 32, 32)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, PooledScoreNetwork):  # its scores are all 0 at first
            torch.nn.init.normal_(module.head.weight)
    return model


def step(model, video, **kwargs):
    """(losses, sample, gradient of every parameter) of one forward and backward pass."""
    model.zero_grad()
    prediction, sample = model(video, **kwargs)
    criterion = AdaMAELoss(patch_size=8, num_masks=len(sample.mask) // len(video), fused_head=model.fused_head)
    out = criterion(prediction, video, sample)
    out.loss.backward()
    return out, sample, {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"sample_from": "pixels"}, {"score_network": "pooled", "decode_ratio": 0.5}])
def test_several_masks_of_a_clip_train_as_copies_of_the_clip_do(options):
    model, video = without_dropout(tiny_model(num_masks=3, **options)).train(), clips()
    out, sample, gradients = step(model, video)
    assert sample.mask.shape == (6, 64)
    assert not torch.equal(sample.mask[0], sample.mask[1])
    assert torch.equal(sample.log_probs[0], sample.log_probs[2])  # one p for all masks of a clip
    again, _, wanted = step(model, video.repeat_interleave(3, 0), mask=sample._replace(log_probs=None))
    for name in ("loss", "reconstruction", "sampling", "token_error"):
        torch.testing.assert_close(getattr(out, name), getattr(again, name))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def test_embedding_the_visible_tokens_alone_changes_nothing():
    video = clips()
    usual, visible_alone = tiny_model(masking="random"), tiny_model(masking="random", sample_from="pixels")
    visible_alone.load_state_dict(usual.state_dict())
    mask = usual.draw_mask(video).mask
    one, _, gradients = step(usual.train(), video, mask=mask)
    two, _, others = step(visible_alone.train(), video, mask=mask)
    torch.testing.assert_close(one.token_error, two.token_error)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-7, msg=name)


def test_thumbnails_are_the_means_of_pixels():
    video = clips()
    small = ops.thumbnails(video, patch_size=8)
    assert small.shape == (2, 64, 2 * 4 * 4 * 3)
    pixels = patchify(video, 8, 2).view(2, 64, 2, 8, 8, 3)
    torch.testing.assert_close(small.view(2, 64, 2, 4, 4, 3)[:, :, 1, 2, 3], pixels[:, :, 1, 4:6, 6:8].mean((2, 3)))


def test_the_sampler_learns_from_pixels():
    """Every parameter of the sampler gets a gradient, except the bias that shifts all scores alike."""
    model = without_dropout(tiny_model(**FAST)).train()
    _, _, gradients = step(model, clips())
    sampler = {name: each for name, each in gradients.items() if name.startswith("sampler.")}
    assert all(each.abs().sum() > 0 for name, each in sampler.items() if not name.endswith("head.bias"))
    assert len(sampler) > 10


@pytest.mark.parametrize("masking", ["adaptive", "random"])
def test_a_part_of_the_masked_tokens_is_decoded_in_training_alone(masking):
    model, video = tiny_model(masking=masking, decode_ratio=0.5).train(), clips()
    prediction, sample = model(video)
    assert prediction.shape[1] == 24
    assert sample.masked_idx.shape[1] == 48
    decoded, masked = (set(each[0].tolist()) for each in (sample.decoded_idx, sample.masked_idx))
    assert decoded < masked
    assert sample.decoded_idx[0].tolist() == sorted(decoded)
    assert CRITERION(prediction, video, sample).token_error.shape == (2, 24)
    prediction, sample = model.eval()(video)
    assert prediction.shape[1] == 48
    assert sample.decoded_idx is None


def test_every_masked_token_is_decoded_as_often_as_any_other():
    model = tiny_model(decode_ratio=0.25)
    from adamae_sampler.sampler import draw_decoded

    sample = model.draw_mask(clips(1))
    counts = torch.zeros(64)
    for _ in range(800):
        counts[draw_decoded(sample, 12).decoded_idx[0]] += 1
    assert counts[sample.visible_idx[0]].sum() == 0
    assert counts[sample.masked_idx[0]].sub(200).abs().max() < 5 * (800 * 0.25 * 0.75) ** 0.5


def test_a_decoder_of_a_part_of_the_tokens_keeps_their_positions():
    """Without attention a prediction depends on its own token alone, so it equals the one of the whole decoder."""
    model, video = tiny_model().eval(), clips()
    for block in model.decoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    sample = model.draw_mask(video)
    whole, _ = model(video, mask=sample)
    chosen = torch.tensor([[1, 5, 40], [0, 2, 47]])
    part, _ = model(video, mask=sample._replace(decoded_idx=sample.masked_idx.gather(1, chosen)))
    torch.testing.assert_close(part, whole.gather(1, chosen[:, :, None].expand(-1, -1, whole.shape[2])))


@pytest.mark.parametrize("options", [{}, {"decode_ratio": 0.5}, {"num_masks": 2}])
@pytest.mark.parametrize("rows", [10**6, 96, 7])
def test_a_fused_head_gives_the_same_losses_and_gradients(options, rows, monkeypatch):
    """The head takes all rows at once, one or two masks at a time, or parts of a mask."""
    monkeypatch.setattr(head, "_CHUNK_BYTES", rows * 384 * 4)
    video, found = clips(), []
    for fused in (False, True):
        torch.manual_seed(0)
        model = without_dropout(tiny_model(fused_head=fused, **options)).train()
        torch.manual_seed(1)
        found.append(step(model, video))
    (one, _, gradients), (two, _, others) = found
    # Not bit for bit: the order of summation in a matrix product may depend on its number of rows.
    torch.testing.assert_close([*one], [*two], rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-5, atol=1e-8, msg=name)


def test_a_fused_head_holds_no_prediction():
    model, video = tiny_model(fused_head=True).train(), clips()
    sizes = []

    def seen(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    inputs, sample = model(video)
    assert isinstance(inputs, HeadInputs)
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        AdaMAELoss(patch_size=8, fused_head=True)(inputs, video, sample).loss.backward()
    assert (2, 48, 384) not in sizes
    assert (2, 48, 16) in sizes  # the hidden states' gradient
    assert isinstance(model.eval()(video)[0], torch.Tensor)
    with pytest.raises(TypeError, match="give AdaMAELoss fused_head=True"):
        CRITERION(inputs, video, sample)
    with pytest.raises(ValueError, match="a fused head takes no decode_mask"):
        AdaMAELoss(patch_size=8, fused_head=True)(inputs, video, sample, decode_mask=sample.mask)
    with pytest.raises(ValueError, match=r"weight has shape \(384, 8\), expected \(384, 16\)"):
        AdaMAELoss(patch_size=8, fused_head=True)((inputs.hidden, inputs.weight[:, :8], None), video, sample)


@pytest.mark.parametrize("grid", [(4, 4, 4), (8, 14, 14), (3, 5, 7), (1, 14, 14), (1, 1, 3)])
def test_pooled_scores_of_any_grid(grid):
    tokens = torch.randn(2, grid[0] * grid[1] * grid[2], 12)
    network = PooledScoreNetwork(12, grid, width=24, num_heads=2).eval()
    assert not network(tokens).any()  # every mask is as likely as any other at first
    torch.nn.init.normal_(network.head.weight)
    scores = network(tokens)
    assert scores.shape == tokens.shape[:2]
    assert len(set(scores[0].tolist())) == tokens.shape[1]  # even tokens of one cell differ
    scores.square().sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in network.parameters())


@pytest.mark.parametrize(("grid", "pool"), [((4, 4, 4), (2, 2, 2)), ((3, 5, 7), (2, 3, 4)), ((1, 1, 3), (1, 1, 2))])
def test_a_cell_is_the_mean_of_its_tokens(grid, pool):
    network = PooledScoreNetwork(8, grid, pool=pool, width=24, num_heads=2)
    seen = torch.randn(2, math.prod(grid), 24)
    as_image = seen.transpose(1, 2).unflatten(2, grid)
    wanted = avg_pool3d(as_image, pool, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
    inputs = []
    network.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    network.project = torch.nn.Identity()
    network(seen)
    torch.testing.assert_close(inputs[0], wanted)  # the position is 0 at first


@pytest.mark.parametrize(
    ("grid", "pool"),
    [
        ((8, 14, 14), (2, 2, 2)),
        ((16, 14, 14), (4, 2, 2)),
        ((32, 14, 14), (8, 2, 2)),
        ((32, 24, 24), (8, 4, 4)),
        ((1, 14, 14), (1, 2, 2)),
    ],
)
def test_cells_grow_with_the_grid(grid, pool):
    network = PooledScoreNetwork(8, grid, width=24, num_heads=2)
    assert network.pool == pool
    assert network.pos_embed.shape[1] <= 200


def test_pooled_scores_see_the_other_cells_and_their_own_place():
    network = PooledScoreNetwork(12, GRID, width=24, num_heads=2).eval()
    for each in (network.pos_embed, network.head.weight):
        torch.nn.init.normal_(each)
    tokens = torch.randn(1, 64, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(tokens)[0, 0], tokens)
    assert (gradient[0].abs().sum(1) > 0).all()
    same = torch.ones(1, 64, 12)
    by_cell = network(same).view(2, 2, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(8, 8)
    assert torch.equal(by_cell.amin(1), by_cell.amax(1))  # tokens of one cell share its position
    assert len(set(by_cell[:, 0].tolist())) == 8


def test_temperature_and_exploration():
    tokens = torch.randn(2, 64, 8)
    torch.manual_seed(0)
    plain = AdaptiveTokenSampler(8, GRID, 0.75, network="mlp")
    scores = plain.scores(tokens)
    for options, wanted in (
        ({"temperature": 2.0}, (scores / 2).softmax(1)),
        ({"exploration": 0.25}, 0.75 * scores.softmax(1) + 0.25 / 64),
        ({"temperature": 0.5, "exploration": 0.1}, 0.9 * (scores * 2).softmax(1) + 0.1 / 64),
    ):
        sampler = AdaptiveTokenSampler(8, GRID, 0.75, network="mlp", **options)
        sampler.load_state_dict(plain.state_dict())
        torch.testing.assert_close(sampler(tokens).log_probs.exp(), wanted)
        given = sampler(tokens, mask=sampler(tokens).mask)
        torch.testing.assert_close(given.log_probs.exp(), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "random", "exploration": 0.1}, "exploration=0.1: only masking='adaptive' takes it"),
        ({"masking": "hard", "temperature": 2.0}, "temperature=2.0: only masking='adaptive' takes it"),
        ({"masking": "blocks"}, "masking='blocks', expected 'adaptive', .*'hard' or a TokenSampler"),
        ({"masking": HardTokenSampler(16, GRID, 0.75, "mlp")}, "the sampler's embed_dim is 16, expected 32"),
        (
            {"masking": "tube", "score_network": "pooled"},
            "score_network='pooled': only masking='adaptive' or 'hard' takes it",
        ),
        (
            {"masking": RandomTokenSampler(GRID, 0.75), "temperature": 2.0},
            "temperature=.*: .* the sampler given has its own",
        ),
        ({"masking": RandomTokenSampler(GRID, 0.75), "num_masks": 2}, "num_masks=2, but the sampler given has 1"),
        ({"masking": RandomTokenSampler(GRID, 0.5)}, "mask_ratio=0.75, but the sampler given has 0.5"),
        (
            {"masking": AdaptiveTokenSampler(16, GRID, 0.75), "sample_from": "pixels"},
            "the sampler's embed_dim is 16, expected 96: .*'pixels'",
        ),
        ({"decode_ratio": 0.0}, "decode_ratio=0.0, expected a share of the masked tokens"),
        ({"decode_ratio": 1.5}, "decode_ratio=1.5, expected"),
        ({"sample_from": "frames"}, "sample_from='frames', expected 'tokens' or 'pixels'"),
        ({"temperature": 0.0}, "temperature=0.0, expected a positive number"),
        ({"exploration": 1.0}, "exploration=1.0, expected a share of p"),
        ({"score_network": "mla"}, "score network 'mla', expected 'mha', 'mlp', 'mlp_linear', 'pooled'"),
        ({"score_network": "mlp", "score_depth": 2}, "score_depth=2: the score network 'mlp' has no blocks"),
        ({"score_depth": 0}, "score_depth=0, expected a whole number, 1 or more"),
        ({"score_width": 100}, "score_width=100, expected a multiple of the 8 heads .* 'mha', such as 96 or 104"),
        ({"score_network": "pooled", "score_width": 2}, "score_width=2, .* 3 heads .* 'pooled', such as 3\\."),
        ({"masking": "random", "score_width": 8}, "score_width=8: only masking='adaptive' or 'hard' takes it"),
        ({"score_network": torch.nn.Identity(), "score_depth": 2}, "score_depth=2, .*: the Identity given has its own"),
        ({"target_ratio": 0.75}, "target_ratio=0.75 sets 48 of 64 tokens aside, expected 1 to 47: .* and 0.734"),
        ({"target_ratio": 0.001}, "target_ratio=0.001 sets 0 of 64 tokens aside, .* Use between 0.0156 and"),
        ({"target_ratio": -0.1}, "target_ratio=-0.1, expected a share of the tokens below 1"),
        ({"target_ratio": 0.25, "decode_ratio": 0.5}, "decode_ratio=0.5 has no effect with target_ratio=0.25"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)
    with pytest.raises(ValueError, match="5 heads do not divide the score network's width 192"):
        PooledScoreNetwork(12, GRID, num_heads=5)
    with pytest.raises(ValueError, match=r"expected 64 tokens, for the grid \(4, 4, 4\)"):
        PooledScoreNetwork(12, GRID)(torch.randn(1, 32, 12))


def test_the_defaults_are_the_exact_method():
    model = tiny_model().train()
    assert isinstance(model.sampler.network, MHAScoreNetwork)
    prediction, sample = model(clips())
    assert isinstance(prediction, torch.Tensor)
    assert sample.decoded_idx is None
    assert torch.equal(sample.target_idx, sample.masked_idx)
    assert model.sampler.num_masks == 1
    assert MaskSample._fields[:4] == ("visible_idx", "masked_idx", "mask", "log_probs")


# Its partitioner follows every path of set_log_prob's graph, github.com/pytorch/pytorch/issues/145081.
needs_torch_2_7 = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 does not end compiling it")


@pytest.mark.parametrize(
    ("options", "estimator"),
    [
        ({**FAST, "temperature": 2.0, "exploration": 0.1}, "categorical"),
        pytest.param({"num_masks": 2, "fused_head": True}, "plackett_luce", marks=needs_torch_2_7),
        pytest.param(
            {"num_masks": 2, "target_ratio": 0.25}, "plackett_luce", marks=[needs_torch_2_7, pytest.mark.slow]
        ),
        *(
            pytest.param({"masking": name, "num_masks": 2, "score_network": network}, "categorical", marks=marks)
            for name, network, marks in (
                ("block", "mha", pytest.mark.slow),
                ("grid", "mha", pytest.mark.slow),
                ("motion", "mha", pytest.mark.slow),
                ("hard", "pooled", ()),
            )
        ),
    ],
)
def test_a_step_compiles_as_one_graph(options, estimator):
    model = tiny_model(**options).train()
    num_masks = model.sampler.num_masks
    criterion = AdaMAELoss(patch_size=8, estimator=estimator, num_masks=num_masks, fused_head=True)

    def step(video):
        prediction, sample = model(video)
        return criterion(prediction, video, sample).loss

    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(clips())
    loss.backward()
    assert loss.isfinite()
    assert all(each.grad is not None for each in model.parameters())


def test_the_loss_refuses_another_number_of_masks():
    """A loss for one mask of a clip refuses a sample with two masks of each clip."""
    model, video = tiny_model(num_masks=2).train(), clips(2)
    prediction, sample = model(video)
    with pytest.raises(ValueError, match="num_masks=0, expected the sampler's number of masks"):
        AdaMAELoss(num_masks=0)
    with pytest.raises(ValueError, match="the sample has 4 rows, expected 2 clips x num_masks=1"):
        CRITERION(prediction, video, sample)


def test_scores_that_are_not_finite_keep_their_meaning_with_exploration():
    sampler = AdaptiveTokenSampler(8, GRID, 0.75, network=torch.nn.Flatten(2), exploration=0.5)
    tokens = torch.zeros(1, 64, 1)
    sampler.embed_dim, sampler.network = 1, torch.nn.Sequential(torch.nn.Flatten(1))
    tokens[0, 3], tokens[0, 5], tokens[0, 9] = torch.nan, torch.inf, -torch.inf
    sample = sampler(tokens)
    assert sample.num_nonfinite.tolist() == [3]
    assert not sample.mask[0, 5]
    assert sample.mask[0, [3, 9]].all()


def test_presets_are_their_settings():
    assert PRESETS["fast"] == {"score_network": "pooled", "sample_from": "pixels", "decode_ratio": 0.5}
    usual = {name: each.default for name, each in inspect.signature(AdaMAE).parameters.items()}
    assert PRESETS["exact"] == {name: usual[name] for name in PRESETS["exact"]}
    fast = create(preset="fast")
    assert isinstance(fast.sampler.network, PooledScoreNetwork)
    assert (fast.sample_from, fast.decode_ratio) == ("pixels", 0.5)
    hard = create(preset="fast", masking="hard")
    assert isinstance(hard.sampler.network, PooledScoreNetwork)
    for options in ({}, {"preset": "exact"}, {"preset": "exact", "masking": "random"}):
        exact = create(**options)
        assert (exact.sample_from, exact.decode_ratio) == ("tokens", 1.0)
    assert isinstance(create(preset="exact").sampler.network, MHAScoreNetwork)
    assert create(preset="fast", decode_ratio=0.5, mask_ratio=0.75).decode_ratio == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quick"}, "preset='quick', expected one of 'exact', 'fast'"),
        ({"preset": "fast", "decode_ratio": 0.25}, "decode_ratio=0.25 contradicts preset='fast'"),
        ({"preset": "exact", "score_network": "pooled"}, "score_network='pooled' contradicts preset='exact'"),
        ({"preset": "fast", "masking": "tube"}, "masking='tube' contradicts preset='fast'"),
    ],
)
def test_arguments_that_contradict_a_preset_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def create(**options):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_embed_dim": 24, "decoder_depth": 1}
    sizes |= {"img_size": 32, "num_frames": 8, "patch_size": 8, "decoder_num_heads": 2}
    return timm.create_model("pretrain_adamae_vit_base_patch16_224", **sizes | {"mask_ratio": 0.75} | options)
