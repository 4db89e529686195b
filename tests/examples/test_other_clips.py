"""The examples of volumes and spectrograms: their data, and what their samplers learn."""

import pytest
import spectrograms
import torch
import volumes
from einops import rearrange

from adamae_sampler import AdaMAELoss, MaskSample

CASES = [(volumes, volumes.scans, volumes.PATCH), (spectrograms, spectrograms.recordings, (1, *spectrograms.PATCH))]


@pytest.mark.parametrize("example", [volumes, spectrograms])
def test_p_turns_to_what_nothing_around_it_tells(example):
    ratios = example.main(steps=60)
    assert ratios[0] == pytest.approx(1, abs=1e-3)
    assert sum(ratios[-10:]) / 10 > 1.2


@pytest.mark.parametrize("example", [volumes, spectrograms])
def test_without_the_sampling_loss_masks_stay_random(example):
    assert example.main(steps=5, sampling_weight=0.0) == pytest.approx([1] * 5, abs=1e-3)


@pytest.mark.parametrize(("example", "make", "patch"), CASES)
def test_tokens_that_count_are_those_with_data(example, make, patch):
    pixels, valid, hard = make(torch.Generator().manual_seed(1))
    cut = "b c (t u) (h p) (w q) -> b (t h w) (u p q c)"
    tokens = rearrange(pixels, cut, u=patch[0], p=patch[1], q=patch[2])
    has_data = (tokens != 0).float().mean(2)
    assert (has_data[valid] >= 0.4).all()
    assert (has_data[~valid] < 0.6).all()
    assert not valid.all()
    assert not (hard & ~valid).any()
    assert 0 < hard.sum() < 0.3 * valid.sum()
    mask = (torch.rand(valid.shape).masked_fill(~valid, 2).argsort(1).argsort(1)) >= 10
    sample = MaskSample.from_mask(mask, 10)._replace(valid=valid)
    prediction = torch.randn(len(pixels), sample.masked_idx.shape[1], tokens.shape[2])
    out = AdaMAELoss(patch_size=patch[1:], tubelet_size=patch[0], normalize=False)(prediction, pixels, sample)
    difference = prediction - tokens[mask].view_as(prediction)
    torch.testing.assert_close(out.reconstruction, difference[valid[mask].view(len(pixels), -1)].square().mean())
