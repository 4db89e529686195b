"""Options of the sampler of the reference model: targets that are set aside, depth and width of the score network."""

import pytest
import torch
from conftest import tiny_model

from adamae_sampler import AdaMAELoss, AdaptiveTokenSampler
from adamae_sampler.networks import MHAScoreNetwork

GRID = (4, 4, 4)


def clips(batch=2):
    return torch.randn(batch, 3, 8, 32, 32)


@pytest.mark.parametrize("num_masks", [1, 3])
def test_targets_are_set_aside_before_the_draw(num_masks):
    """All masks of a clip have the same targets, drawn uniformly; they are never shown, and alone decoded."""
    sampler = AdaptiveTokenSampler(8, GRID, 0.75, network="mlp", num_masks=num_masks, target_ratio=0.25)
    tokens = torch.randn(400, 64, 8)
    plain = sampler.eval()(tokens)
    assert (plain.held_out, plain.decoded_idx) == (None, None)  # pictures and evaluation decode what is masked
    sample = sampler.train()(tokens)
    assert sample.decoded_idx.shape == (400 * num_masks, 16)
    assert torch.equal(sample.held_out.nonzero()[:, 1].view(-1, 16), sample.decoded_idx)
    assert not (sample.held_out & ~sample.mask).any()
    assert torch.equal(sample.held_out, sample.held_out[::num_masks].repeat_interleave(num_masks, 0))
    torch.testing.assert_close(sample.log_probs, plain.log_probs)  # of all tokens, targets too
    shares = sample.held_out[::num_masks].float().mean(0)
    assert float((shares - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert not sample.num_nonfinite.any()


def test_a_model_with_targets_decodes_them_alone_and_trains_its_sampler():
    model = tiny_model(target_ratio=0.25, num_masks=2).train()
    criterion = AdaMAELoss(patch_size=8, estimator="plackett_luce", num_masks=2, sampling_weight=1.0)
    prediction, sample = model(clips())
    assert prediction.shape[1] == 16
    out = criterion(prediction, clips(), sample)
    assert out.token_error.shape == sample.decoded_idx.shape
    out.loss.backward()
    assert float(model.sampler.network.head.weight.grad.abs().max()) > 0
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[:, :20] = False
    sample = model(clips(), valid=valid)[1]
    assert not (sample.held_out & ~valid.repeat_interleave(2, 0)).any()
    assert not (~sample.mask & ~valid.repeat_interleave(2, 0)).any()
    valid[1, :32] = False
    with pytest.raises(
        ValueError, match="row 1 of valid has 32 valid tokens of 64, expected at least 33: 16 are shown, 16"
    ):
        model(clips(), valid=valid)


def test_depth_and_width_of_the_score_network():
    """The supplement's ablation MHA(D=2, d=384), at a smaller width; and Figure 1a as it is drawn."""
    network = tiny_model(score_depth=2, score_width=16).sampler.network
    assert isinstance(network, MHAScoreNetwork)
    assert (len(network.blocks), network.pos_embed.shape[-1], network.project.out_features) == (2, 16, 16)
    assert len(tiny_model(score_network="pooled", score_depth=2, score_width=24).sampler.network.blocks) == 2
    drawn = tiny_model(score_network="mlp_linear").sampler.network
    tokens, one = torch.randn(1, 64, 32), torch.zeros(1, 64, 32)
    torch.testing.assert_close(  # a linear map, up to its constant
        drawn(3 * tokens) - drawn(one), 3 * (drawn(tokens) - drawn(one)), rtol=1e-4, atol=1e-5
    )
    curved = tiny_model(score_network="mlp").sampler.network
    assert not torch.allclose(curved(3 * tokens) - curved(one), 3 * (curved(tokens) - curved(one)), rtol=1e-2)
    assert {name: each.shape for name, each in drawn.state_dict().items()} == {
        name: each.shape for name, each in curved.state_dict().items()
    }
