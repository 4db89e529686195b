"""Samplers at other grids than their own, and models that train on clips of several sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from hosts import make_hf_vit_mae, make_prithvi

from adamae_sampler import AdaMAELoss, AdaptiveTokenSampler, RandomTokenSampler, TubeTokenSampler, patch
from adamae_sampler.mask import MaskSample
from adamae_sampler.networks import MHAScoreNetwork, MLPScoreNetwork, PooledScoreNetwork
from adamae_sampler.positions import resample
from adamae_sampler.sampler import MASKINGS, ScoredTokenSampler, TokenSampler

OWN = (2, 4, 4)
OTHERS = [(2, 6, 4), (4, 4, 4), (3, 5, 7)]
WIDTH = 32


def make(name, **options):
    kind = MASKINGS[name]
    width = {"embed_dim": WIDTH} if issubclass(kind, ScoredTokenSampler) else {}
    return kind(**width, grid_size=OWN, mask_ratio=0.5, **options)


def tokens_of(grid, clips=3):
    return torch.randn(clips, math.prod(grid), WIDTH)


def expected_visible(name, grid):
    if name == "tube":
        return grid[0] * (grid[1] * grid[2] - math.floor(grid[1] * grid[2] * 0.5))
    if name == "frame":
        return (grid[0] - math.floor(grid[0] * 0.5)) * grid[1] * grid[2]
    return math.floor(math.prod(grid) * 0.5)


def test_a_resampled_table_is_that_of_trilinear_interpolation():
    table = torch.randn(1, 32, 5, dtype=torch.float64, requires_grad=True)
    for grid in OTHERS:
        found = resample(table, OWN, grid)
        expected = F.interpolate(table.view(1, *OWN, 5).permute(0, 4, 1, 2, 3), grid, mode="trilinear").flatten(2).mT
        torch.testing.assert_close(found, expected)
        weight = torch.randn_like(found)
        one, other = (torch.autograd.grad((each * weight).sum(), table)[0] for each in (found, expected))
        torch.testing.assert_close(one, other)
    assert resample(table, OWN, OWN) is table


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("num_masks", [1, 2])
def test_every_sampler_draws_at_other_grids(name, num_masks):
    sampler = make(name, num_masks=num_masks)
    for grid in (*OTHERS, OWN):
        sample = sampler(tokens_of(grid), grid_size=grid)
        number, visible = math.prod(grid), expected_visible(name, grid)
        assert sample.mask.shape == (3 * num_masks, number)
        assert sample.visible_idx.shape[1] == sampler.num_visible_at(grid) == visible
        assert (~sample.mask).sum(1).eq(visible).all()
        both = torch.cat([sample.visible_idx, sample.masked_idx], 1).sort(1).values
        assert torch.equal(both, torch.arange(number).expand_as(both))
        assert not sample.mask.gather(1, sample.visible_idx).any()
        given = sampler(tokens_of(grid), grid_size=grid, mask=sample.mask)
        assert torch.equal(given.visible_idx, sample.visible_idx)


@pytest.mark.parametrize("name", MASKINGS)
def test_at_its_own_grid_nothing_changes(name):
    sampler, tokens = make(name).eval(), tokens_of(OWN)
    one, other = (
        sampler(tokens, generator=torch.Generator().manual_seed(1), **how) for how in ({}, {"grid_size": OWN})
    )
    for first, second in zip(one, other, strict=True):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("name", ["tube", "frame", "grid", "block", "random"])
def test_another_grid_is_drawn_as_by_a_sampler_of_that_grid(name):
    """The same noise gives the same masks."""
    for grid in OTHERS:
        tokens = tokens_of(grid)
        one, other = (
            sampler(tokens, generator=torch.Generator().manual_seed(1), **how)
            for sampler, how in ((make(name), {"grid_size": grid}), (MASKINGS[name](grid, 0.5), {}))
        )
        assert torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("kind", [MHAScoreNetwork, PooledScoreNetwork])
@pytest.mark.parametrize("grid", OTHERS)
def test_scores_are_those_of_a_network_with_a_resampled_table(kind, grid):
    if kind is MHAScoreNetwork:
        own, other = MHAScoreNetwork(WIDTH, 32, grid_size=OWN), MHAScoreNetwork(WIDTH, math.prod(grid))
        before, after = OWN, grid
    else:
        pool = (2, 2, 2)
        own, other = (PooledScoreNetwork(WIDTH, each, pool, width=24) for each in (OWN, grid))
        before, after = own.cells, other.cells
    torch.nn.init.normal_(own.pos_embed)
    torch.nn.init.normal_(own.head.weight)
    weights = own.state_dict()
    table = weights["pos_embed"].view(1, *before, -1).permute(0, 4, 1, 2, 3)
    other.load_state_dict({**weights, "pos_embed": F.interpolate(table, after, mode="trilinear").flatten(2).mT})
    tokens = tokens_of(grid)
    torch.testing.assert_close(own.eval()(tokens, grid), other.eval()(tokens))


def test_networks_of_a_users_own():
    grid = OTHERS[0]
    sampler = AdaptiveTokenSampler(WIDTH, OWN, 0.5, network=MLPScoreNetwork(WIDTH))
    assert sampler(tokens_of(grid), grid_size=grid).log_probs.shape == (3, 48)
    given = MHAScoreNetwork(WIDTH, 32, num_heads=4)
    sampler = AdaptiveTokenSampler(WIDTH, OWN, 0.5, network=given)  # the sampler tells it the grid
    assert sampler(tokens_of(grid), grid_size=grid).num_visible == 24
    with pytest.raises(ValueError, match=r"grid \(2, 6, 4\), and the network does not know the grid of its own 32"):
        MHAScoreNetwork(WIDTH, 32)(tokens_of(grid), grid)


def test_a_compiled_network_gets_the_grid():
    grid = OTHERS[0]
    sampler = AdaptiveTokenSampler(WIDTH, OWN, 0.5)
    expected = sampler.eval()(tokens := tokens_of(grid), grid_size=grid).log_probs
    sampler.network = torch.compile(sampler.network, backend="eager")
    torch.testing.assert_close(sampler(tokens, grid_size=grid).log_probs, expected)


def test_wrong_grids_are_named():
    sampler = RandomTokenSampler(OWN, 0.5)
    with pytest.raises(
        ValueError, match=r"48 tokens, but the grid \(2, 4, 4\) has 32.*call the sampler with grid_size="
    ):
        sampler(tokens_of((2, 6, 4)))
    with pytest.raises(ValueError, match=r"48 tokens, but the grid \(2, 4, 7\) has 56"):
        sampler(tokens_of((2, 6, 4)), grid_size=(2, 4, 7))
    with pytest.raises(ValueError, match="expected three positive integers"):
        sampler(tokens_of((2, 6, 4)), grid_size=(2, 24))
    with pytest.raises(ValueError, match="leaves 0 of 2 tokens visible"):
        RandomTokenSampler(OWN, 0.9)(tokens_of((1, 1, 2)), grid_size=(1, 1, 2))
    with pytest.raises(ValueError, match="has one time step"):
        make("motion")(tokens_of((1, 4, 4)), grid_size=(1, 4, 4))

    class Mine(TokenSampler):
        num_visible = 16

        def draw(self, tokens, generator):
            return MaskSample.from_mask(torch.arange(32).expand(len(tokens), 32) < 16, 16)

    mine = Mine(OWN, 0.5)
    assert mine(tokens_of(OWN)).num_visible == 16
    with pytest.raises(
        ValueError, match=r"Mine draws for its own grid \(2, 4, 4\), and got .*an argument grid_size=None"
    ):
        mine(tokens_of((2, 6, 4)), grid_size=(2, 6, 4))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("adaptive", "block") else pytest.mark.slow) for name in MASKINGS]
)
def test_each_grid_compiles_as_one_graph(name):
    sampler = make(name)

    @torch.compile(backend="eager", fullgraph=True)
    def step(tokens, grid):
        return sampler(tokens, grid_size=grid).visible_idx

    for grid in (OWN, OTHERS[2]):
        assert step(tokens_of(grid), grid).shape == (3, expected_visible(name, grid))


# ---- models that train on several sizes ----


def train(model, inputs_of, loss_of, rounds=4):
    """Trains on each size in turn; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shapes = {name: each.shape for name, each in model.state_dict().items()}
    losses = []
    for step in range(rounds):
        for inputs in inputs_of(step):
            loss = loss_of(inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert {name: each.shape for name, each in model.state_dict().items()} == shapes
    return losses


@pytest.mark.parametrize("score_network", ["mha", "mlp", "pooled"])
@pytest.mark.parametrize("sample_from", ["tokens", "pixels"])
def test_the_reference_model_trains_on_three_sizes(score_network, sample_from):
    torch.manual_seed(0)
    model = tiny_model(dynamic_img_size=True, score_network=score_network, sample_from=sample_from).train()
    sizes = [(3, 8, 32, 32), (3, 16, 24, 48), (3, 4, 40, 32)]

    def loss_of(video):
        prediction, sample = model(video)
        tokens = video.shape[2] // 2 * (video.shape[3] // 8) * (video.shape[4] // 8)
        assert sample.mask.shape[1] == tokens
        assert sample.num_visible == math.floor(tokens * (1 - model.sampler.mask_ratio) + 1e-9)
        return AdaMAELoss(patch_size=8)(prediction, video, sample).loss

    losses = train(model, lambda step: [torch.rand(2, *size) for size in sizes], loss_of)
    assert all(math.isfinite(each) for each in losses)
    assert all(each.grad is not None for each in model.sampler.parameters())


def test_the_reference_model_at_its_own_size_is_the_one_without_the_option():
    video = torch.rand(2, 3, 8, 32, 32)
    usual, dynamic = tiny_model().eval(), tiny_model(dynamic_img_size=True).eval()
    dynamic.load_state_dict(usual.state_dict())
    sample = usual.draw_mask(video, generator=torch.Generator().manual_seed(0))
    again = dynamic.draw_mask(video, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample.log_probs, again.log_probs)
    assert torch.equal(sample.mask, again.mask)
    assert torch.equal(usual(video, sample)[0], dynamic(video, sample)[0])
    with pytest.raises(ValueError, match="dynamic_img_size=True to take other sizes"):
        usual(torch.rand(2, 3, 8, 40, 32))
    with pytest.raises(ValueError, match="36"):
        dynamic(torch.rand(2, 3, 8, 36, 32))
    with pytest.raises(ValueError, match=r"expected \[B, 3, T, H, W\]"):
        dynamic(torch.rand(2, 4, 8, 32, 32))


@pytest.mark.parametrize("network", ["mha", "pooled"])
def test_vit_mae_trains_on_three_sizes(network):
    model = patch(make_hf_vit_mae().train(), 0.75, network=network)
    sizes = [(32, 32), (48, 48), (24, 40)]

    def loss_of(images):
        output = model(images, interpolate_pos_encoding=True)
        tokens = images.shape[2] // 4 * (images.shape[3] // 4)
        assert output.mask.sum(1).tolist() == [tokens - tokens // 4] * 2
        assert output.logits.shape[1] == tokens
        assert torch.equal(output.mask, model.last_step.sample.mask.float())
        return output.loss

    losses = train(model, lambda step: [torch.rand(2, 3, *size) for size in sizes], loss_of)
    assert all(math.isfinite(each) for each in losses)
    model.eval()
    images = torch.rand(2, 3, 24, 40)
    sample = model.draw_mask(images)
    model(images, mask=sample, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="doesn't match model"):  # the host's own message
        model(images, mask=sample)


def test_prithvi_trains_on_three_sizes():
    model = patch(make_prithvi().train(), 0.75)
    sizes = [(4, 32, 32), (6, 32, 48), (2, 40, 24)]

    def loss_of(series):
        loss, prediction, _ = model(series)
        tokens = series.shape[2] * (series.shape[3] // 8) * (series.shape[4] // 8)
        assert model.last_step.sample.mask.sum(1).tolist() == [tokens - tokens // 4] * 2
        assert prediction.shape == series.shape
        return loss["loss"]

    losses = train(model, lambda step: [torch.rand(2, 6, *size) for size in sizes], loss_of)
    assert all(math.isfinite(each) for each in losses)


def test_a_host_keeps_its_own_grid_for_samplers_that_know_no_other():
    model = patch(make_hf_vit_mae().train(), sampler=TubeTokenSampler((1, 8, 8), 0.75))
    model(torch.rand(2, 3, 32, 32)).loss.backward()
