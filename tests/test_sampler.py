import pytest
import torch
from torch import nn

from adamae_sampler import (
    AdaptiveTokenSampler,
    BlockTokenSampler,
    FrameTokenSampler,
    GridTokenSampler,
    HardTokenSampler,
    MaskSample,
    MotionTokenSampler,
    RandomTokenSampler,
    TubeTokenSampler,
)
from adamae_sampler.networks import MHAScoreNetwork, MLPScoreNetwork

GRID = (4, 3, 5)


def all_samplers(ratio=0.75):
    return [
        AdaptiveTokenSampler(16, GRID, ratio),
        AdaptiveTokenSampler(16, GRID, ratio, network="mlp"),
        RandomTokenSampler(GRID, ratio),
        TubeTokenSampler(GRID, ratio),
        FrameTokenSampler(GRID, ratio),
        BlockTokenSampler(GRID, ratio),
        GridTokenSampler(GRID, ratio),
        MotionTokenSampler(GRID, ratio),
        HardTokenSampler(16, GRID, ratio),
    ]


@pytest.mark.parametrize("sampler", all_samplers(), ids=lambda s: type(s).__name__)
def test_every_sampler_gives_a_partition_of_static_shape(sampler):
    for batch in (1, 3):
        sample = sampler(torch.randn(batch, 60, 16))
        assert isinstance(sample, MaskSample)
        assert sample.visible_idx.shape == (batch, sampler.num_visible)
        assert sample.mask.shape == (batch, 60)
        both = torch.cat([sample.visible_idx, sample.masked_idx], 1)
        assert both.sort(1).values.tolist() == [list(range(60))] * batch
        assert (sample.visible_idx.diff(dim=1) > 0).all()
        assert (sample.masked_idx.diff(dim=1) > 0).all()
        assert not sample.mask.gather(1, sample.visible_idx).any()
        assert sample.mask.gather(1, sample.masked_idx).all()
        assert (sample.log_probs is None) == (not isinstance(sampler, AdaptiveTokenSampler))
        assert (sample.difficulty is None) == (not isinstance(sampler, HardTokenSampler))


def test_sizes_of_the_strategies_at_the_paper_grid():
    grid = (8, 14, 14)
    assert AdaptiveTokenSampler(8, grid, 0.95).num_visible == 78
    assert RandomTokenSampler(grid, 0.9).num_visible == 156
    assert TubeTokenSampler(grid, 0.9).num_visible == 160  # 20 places in each of 8 time steps, as VideoMAE
    assert FrameTokenSampler(grid, 0.875).num_visible == 196
    assert FrameTokenSampler(grid, 0.95).num_visible == 196


def test_tube_repeats_one_frame_and_frame_masks_whole_frames():
    tokens = torch.zeros(50, 60, 1)
    tube = TubeTokenSampler(GRID, 0.8)(tokens).mask.view(50, 4, 15)
    assert (tube == tube[:, :1]).all()
    assert (tube[:, 0].sum(1) == 12).all()
    assert len(tube[:, 0].unique(dim=0)) > 10
    frame = FrameTokenSampler(GRID, 0.5)(tokens).mask.view(50, 4, 15)
    assert (frame == frame[..., :1]).all()
    assert (frame[..., 0].sum(1) == 2).all()


@pytest.mark.parametrize("cls", [RandomTokenSampler, TubeTokenSampler, FrameTokenSampler])
def test_fixed_strategies_are_uniform(cls):
    sampler = cls(GRID, 0.75)
    seen = (~sampler(torch.zeros(20_000, 60, 1)).mask).double().mean(0)
    share = sampler.num_visible / 60
    assert (seen - share).abs().max() < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_the_generator_decides_the_mask():
    for sampler in all_samplers():
        sampler.eval()
        tokens = torch.randn(2, 60, 16)
        one, two = (sampler(tokens, generator=torch.Generator().manual_seed(1)).mask for _ in range(2))
        assert torch.equal(one, two)


def test_a_given_mask_keeps_the_log_probs_of_the_sampler():
    sampler = AdaptiveTokenSampler(16, GRID, 0.75).eval()
    tokens = torch.randn(2, 60, 16)
    mask = RandomTokenSampler(GRID, 0.75)(tokens).mask
    state = torch.get_rng_state()
    given = sampler(tokens, mask=mask)
    assert torch.equal(given.mask, mask)
    assert torch.equal(given.log_probs, sampler(tokens).log_probs)
    torch.set_rng_state(state)
    sampler(tokens, mask=mask)
    assert torch.equal(torch.get_rng_state(), state)  # a given mask draws no noise
    other = MaskSample.from_mask(torch.arange(60).expand(2, 60) > 0, 1)  # another number of visible tokens
    assert sampler(tokens, mask=other).num_visible == 1
    with pytest.raises(ValueError, match="leaves 1 tokens visible in row 0, expected 15"):
        sampler(tokens, mask=other.mask)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 60\), expected \(3, 60\)"):
        sampler(torch.randn(3, 60, 16), mask=other)


def test_detach_tokens_stops_the_gradient_to_the_tokenizer():
    for detach in (False, True):
        sampler = AdaptiveTokenSampler(16, GRID, 0.75, detach_tokens=detach)
        tokens = torch.randn(2, 60, 16, requires_grad=True)
        sampler(tokens).log_probs[:, :5].sum().backward()
        assert (tokens.grad is None) == detach
        for name, parameter in sampler.named_parameters():
            assert parameter.grad is not None, name


def test_networks_of_other_depth_and_width():
    network = MHAScoreNetwork(16, 60, depth=3, num_heads=2, width=8)
    sampler = AdaptiveTokenSampler(16, GRID, 0.75, network=network)
    assert sampler(torch.randn(2, 60, 16)).log_probs.shape == (2, 60)
    assert [tuple(each.shape) for each in (network.pos_embed, network.project.weight)] == [(1, 60, 8), (8, 16)]
    assert len(network.blocks) == 3
    shapes = [tuple(each.weight.shape) for each in MLPScoreNetwork(16).modules() if isinstance(each, nn.Linear)]
    assert shapes == [(16, 16), (1, 16)]
    with pytest.raises(ValueError, match="3 heads do not divide its width 16"):
        MHAScoreNetwork(16, 60, num_heads=3)


def test_dropout_is_where_the_official_block_has_it():
    block = MHAScoreNetwork(16, 60).blocks[0]
    rates = {name: each.p for name, each in block.named_modules() if isinstance(each, nn.Dropout)}
    assert rates == {"attn.attn_drop": 0.0, "attn.proj_drop": 0.1, "mlp.drop1": 0.0, "mlp.drop2": 0.1}


@pytest.mark.parametrize("network", ["mha", "mlp"])
def test_scores_are_fp32_under_autocast(network):
    sampler = AdaptiveTokenSampler(16, GRID, 0.75, network=network)
    with torch.autocast("cpu", torch.bfloat16):
        sample = sampler(torch.randn(2, 60, 16))
    assert sample.log_probs.dtype == torch.float32
    torch.testing.assert_close(sample.log_probs.exp().sum(1), torch.ones(2))


def test_bad_input():
    sampler = AdaptiveTokenSampler(16, GRID, 0.75)
    cases = [
        (ValueError, r"59 tokens, but the grid \(4, 3, 5\) has 60", lambda: sampler(torch.zeros(1, 59, 16))),
        (ValueError, r"expected \[B, N, D\]", lambda: sampler(torch.zeros(60, 16))),
        (TypeError, "tokens has dtype torch.int64", lambda: sampler(torch.zeros(1, 60, 16, dtype=torch.int64))),
        (
            ValueError,
            "score network 'cnn', expected 'mha', 'mlp'",
            lambda: AdaptiveTokenSampler(16, GRID, network="cnn"),
        ),
        (ValueError, r"grid_size=\(4, 3\), expected three", lambda: RandomTokenSampler((4, 3))),
        (
            ValueError,
            "tokens are 8 wide, expected embed_dim=16",
            lambda: sampler(torch.zeros(1, 60, 8)),
        ),
        (
            ValueError,
            r"mask has shape \(1, 59\), expected \(1, 60\)",
            lambda: sampler(torch.zeros(1, 60, 16), mask=torch.ones(1, 59) > 0),
        ),
        (ValueError, "grid_size=0.9, expected three", lambda: RandomTokenSampler(0.9, GRID)),
        (ValueError, r"expected three positive integers", lambda: RandomTokenSampler((16 / 2, 14, 14))),
        (ValueError, "strictly between 0 and 1", lambda: AdaptiveTokenSampler(16, GRID, 1.0)),
        (ValueError, "leaves 0 of 60 tokens visible", lambda: RandomTokenSampler(GRID, 0.99)),
        (ValueError, "hides 0 of 15 spatial positions in a frame", lambda: TubeTokenSampler(GRID, 0.05)),
        (ValueError, "hides 0 of 4 time steps", lambda: FrameTokenSampler(GRID, 0.2)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    wrong = AdaptiveTokenSampler(16, GRID, 0.75, network=nn.Linear(16, 1))
    with pytest.raises(ValueError, match=r"gave \(2, 60, 1\) .* expected \(2, 60\).*squeeze"):
        wrong(torch.zeros(2, 60, 16))
