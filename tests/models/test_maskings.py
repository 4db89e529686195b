"""The reference model with each masking."""

import pytest
import torch
from conftest import tiny_model
from test_options import GRID, step

from adamae_sampler import AdaptiveTokenSampler
from adamae_sampler.sampler import MASKINGS, ScoredTokenSampler


@pytest.mark.parametrize("sample_from", ["tokens", "pixels"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_every_masking_trains(masking, sample_from):
    model = tiny_model(masking=masking, sample_from=sample_from, num_masks=2).train()
    assert type(model.sampler) is MASKINGS[masking]
    out, sample, gradients = step(model, (255 * torch.rand(2, 3, 8, 32, 32)).to(torch.uint8))
    assert sample.mask.shape == (4, 64)
    assert len(gradients) == len(list(model.parameters()))
    assert bool(out.sampling) == (masking in ("adaptive", "hard"))
    if masking == "motion":
        assert model.sampler.source == "pixels"


def test_motion_masks_follow_the_video():
    model = tiny_model(masking="motion", sample_from="pixels").eval()
    video = torch.full((200, 3, 8, 32, 32), 128, dtype=torch.uint8)
    video[:, :, 4:, 8:16, 16:24] = 255  # the token at (1, 2) of 4 x 4 changes at the third time step
    sample = model.draw_mask(video)
    assert not sample.mask[:, 2 * 16 + 4 + 2].any()
    sizes = model.sampler_tokens(video[:1]).shape
    assert sizes == (1, 64, 96)
    p = model.sampler.log_probs(model.sampler_tokens(video), video).exp()
    torch.testing.assert_close(p[0, 2 * 16 + 4 + 2], torch.tensor(0.8 + 0.2 / 64))


@pytest.mark.parametrize("kind", MASKINGS.values())
def test_every_sampler_draws_several_masks(kind):
    first = (8,) if issubclass(kind, ScoredTokenSampler) else ()
    sampler = kind(*first, GRID, 0.75, num_masks=4)
    sample = sampler(torch.randn(3, 64, 8))
    assert sample.visible_idx.shape == (12, sampler.num_visible)
    many = torch.stack([sampler(torch.randn(3, 64, 8)).mask for _ in range(8)], 1).view(3, 4, 8 * 64)  # clip, mask
    assert all(len(clip.unique(dim=0)) > 1 for clip in many)  # a clip's masks differ
    assert "num_masks=4" in repr(sampler)
    given = sampler(torch.randn(3, 64, 8), mask=sample.mask)
    assert torch.equal(given.visible_idx, sample.visible_idx)
    assert (given.log_probs is None) == (kind is not AdaptiveTokenSampler)
    with pytest.raises(
        ValueError, match=r"mask has shape \(4, 64\), expected \(3, 64\).*num_masks=4 rows for each clip"
    ):
        sampler(torch.randn(3, 64, 8), mask=sample.mask[:4])
    with pytest.raises(ValueError, match="num_masks=0, expected a whole number"):
        kind(*first, GRID, 0.75, num_masks=0)


@pytest.mark.parametrize("kind", MASKINGS.values())
def test_one_compilation_draws_for_batches_of_any_size(kind):
    """As the last, smaller batch of an epoch: torch.compile then makes the batch size symbolic."""
    sampler = kind(*((8,) if issubclass(kind, ScoredTokenSampler) else ()), GRID, 0.75).eval()
    compiled = torch.compile(sampler, backend="aot_eager", fullgraph=True, dynamic=True)
    for clips in (3, 2, 5):
        torch.manual_seed(clips)
        drawn = compiled(torch.randn(clips, 64, 8))
        torch.manual_seed(clips)
        assert torch.equal(drawn.mask, sampler(torch.randn(clips, 64, 8)).mask)
