import pytest
import torch
from conftest import tiny_model

from adamae_sampler import AdaMAELoss, MaskSample, RandomTokenSampler, reconstruction_error, sampling_loss


@pytest.fixture
def parts():
    model = tiny_model()
    video = torch.rand(2, 3, 8, 32, 32)
    prediction, sample = model(video)
    return model, video, prediction, sample


def test_the_loss_is_its_terms(parts):
    _, video, prediction, sample = parts
    out = AdaMAELoss(0.25, patch_size=8)(prediction, video, sample)
    error = reconstruction_error(prediction, video, sample, patch_size=8)
    assert torch.equal(out.token_error, error)
    assert torch.equal(out.reconstruction, error.mean())
    assert torch.equal(out.sampling, sampling_loss(sample, error))
    torch.testing.assert_close(out.loss, out.reconstruction + 0.25 * out.sampling)


def test_p_gets_gradient_from_the_sampling_loss_alone(parts):
    model, video, prediction, sample = parts
    out = AdaMAELoss(patch_size=8)(prediction, video, sample)
    out.reconstruction.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in model.sampler.parameters())
    assert model.encoder.patch_embed.proj.weight.grad is not None
    model.zero_grad()
    out.sampling.backward()
    assert all(parameter.grad is not None for parameter in model.sampler.parameters())
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


def test_harder_tokens_become_likelier():
    """One gradient step on L_S raises p where the error is above average and lowers it where it is below."""
    scores = torch.zeros(1, 6, requires_grad=True)
    sample = MaskSample.from_mask(torch.tensor([[True, True, True, True, False, True]]), 1)
    sample = sample._replace(log_probs=scores.log_softmax(1))
    sampling_loss(sample, torch.tensor([[4.0, 0.1, 0.1, 0.1, 0.1]])).backward()
    assert scores.grad[0, 0] < 0
    assert (scores.grad[0, 1:] > 0).all()


def test_fixed_masks_have_no_sampling_loss(parts):
    _, video, prediction, sample = parts
    fixed = sample._replace(log_probs=None)
    out = AdaMAELoss(patch_size=8)(prediction, video, fixed)
    assert out.sampling == 0
    assert torch.equal(out.loss, out.reconstruction)
    with pytest.raises(ValueError, match="log_probs is None"):
        sampling_loss(RandomTokenSampler((4, 4, 4), 0.75)(torch.zeros(2, 64, 1)), out.token_error)


def test_weight_zero_still_gives_every_sampler_parameter_a_gradient(parts):
    model, video, prediction, sample = parts
    AdaMAELoss(0.0, patch_size=8)(prediction, video, sample).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nan_shows_in_its_term_only(parts):
    _, video, prediction, sample = parts
    log_probs = sample.log_probs.detach().clone()
    log_probs[0, sample.masked_idx[0, 0]] = torch.nan
    out = AdaMAELoss(patch_size=8)(prediction, video, sample._replace(log_probs=log_probs))
    assert out.sampling.isnan()
    assert out.reconstruction.isfinite()


def test_wrong_patch_size_is_named(parts):
    _, video, prediction, sample = parts
    with pytest.raises(ValueError, match="Check patch_size and tubelet_size"):
        AdaMAELoss()(prediction, video, sample)
