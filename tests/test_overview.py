"""`visualize.overview` of models: patched hosts, one's own, the reference model."""

import sys

import pytest
import torch
from conftest import tiny_model
from hosts import CASES
from torch import nn

from adamae_sampler import AdaMAELoss, AdaptiveTokenSampler, ops, patch, visualize

SIZES = {"patch_size": 8, "tubelet_size": 2}


class OwnMAE(nn.Module):
    """The README's YourMAE, small."""

    def __init__(self, num_masks=1):
        super().__init__()
        self.patch_embed = nn.Linear(8 * 8 * 2 * 3, 16)
        self.sampler = AdaptiveTokenSampler(16, (4, 4, 4), 0.75, num_masks=num_masks)
        self.mask_token = nn.Parameter(torch.zeros(16))
        self.decoder = nn.Linear(16, 8 * 8 * 2 * 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, video):
        tokens = self.patch_embed(ops.patchify(video, **SIZES))
        sample = self.sampler(tokens)
        x = ops.gather_tokens(tokens, sample.visible_idx)
        x = ops.assemble_tokens(self.drop(x), self.mask_token, torch.zeros(64, 16), sample)
        return self.decoder(x)[:, sample.num_visible :], sample


def labels_of(figure):
    return [axes.get_ylabel().split("\n")[0] for axes in figure.axes if axes.get_ylabel()]


def drawn(figure, row, columns):
    """The images of a row, [columns, H, W]."""
    axes = figure.axes[row * columns : (row + 1) * columns]
    return torch.stack([torch.as_tensor(each.images[0].get_array()) for each in axes])


def error_of_one(model, case, inputs, sample, token):
    """The host's own loss if this masked token alone counts. The picture's errors come by another way."""
    valid = ~sample.mask
    valid[0, token] = True
    with torch.no_grad():
        model(inputs, **{case.mask_argument: sample._replace(valid=valid)})
    return float(model.last_step.reconstruction)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patched_host_is_drawn(case):
    model, inputs = patch(case.make()), torch.rand(1, *case.shape)
    video, grid = model.as_video(inputs), model.grid_of(inputs) or model.sampler.grid_size
    channels = None if video.shape[1] in (1, 3) else (2, 1, 0)
    if model.computes_loss:
        figure, rows = visualize.overview(model, inputs, channels=channels), ["video", "error", "p", "mask"]
    else:
        tubelet, *patch_size = (side // tokens for side, tokens in zip(video.shape[2:], grid, strict=True))
        criterion = AdaMAELoss(patch_size=tuple(patch_size), tubelet_size=tubelet)
        figure, rows = visualize.overview(model, inputs, criterion), ["video", "prediction", "error", "p", "mask"]
    assert labels_of(figure) == rows
    assert len(figure.axes) == len(rows) * grid[0]  # a column for each time step
    assert model.training
    error, sample = drawn(figure, rows.index("error"), grid[0]).flatten(), model.last_step.sample
    assert (error[sample.visible_idx[0]] == 0).all()
    if model.computes_loss:
        for token in sample.masked_idx[0, ::7].tolist():
            expected = error_of_one(model.eval(), case, inputs, sample, token)
            assert float(error[token]) == pytest.approx(expected, rel=1e-3)
        with pytest.raises(ValueError, match="computes its own loss; leave the criterion out"):
            visualize.overview(model, inputs, AdaMAELoss())
    else:
        with pytest.raises(TypeError, match=r"does not compute its loss.*expected the AdaMAELoss of your training"):
            visualize.overview(model, inputs)


def test_a_model_of_ones_own_is_drawn_with_its_criterion():
    torch.manual_seed(0)
    model, video = OwnMAE(), torch.rand(2, 3, 8, 32, 32)
    model.drop.eval()  # a module that the user keeps in evaluation mode stays so
    figure = visualize.overview(model, video, AdaMAELoss(**SIZES), clip=1)
    assert labels_of(figure) == ["video", "prediction", "error", "p", "mask"]
    assert model.training
    assert not model.drop.training
    assert torch.equal(drawn(figure, 0, 4), video[1, :, ::2].permute(1, 2, 3, 0))
    assert visualize.animation(model, video, AdaMAELoss(**SIZES)).shape[0] == 8


def test_the_reference_model_of_several_masks_is_drawn():
    model, video = tiny_model(num_masks=2), torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    figure = visualize.overview(model, video, AdaMAELoss(num_masks=2, **SIZES), clip=3)
    assert torch.equal(drawn(figure, 0, 4), video[1, :, ::2].permute(1, 2, 3, 0))


def test_floating_point_pixels_are_shown_as_they_were():
    video = torch.rand(1, 3, 8, 32, 32)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    normalised = (video - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    model = OwnMAE()
    known = visualize.overview(model, normalised, AdaMAELoss(mean=mean, std=std, **SIZES))
    torch.testing.assert_close(drawn(known, 0, 4), video[0, :, ::2].permute(1, 2, 3, 0))
    stretched = drawn(visualize.overview(model, normalised, AdaMAELoss(**SIZES)), 0, 4)
    clip = normalised[0, :, ::2].permute(1, 2, 3, 0)
    torch.testing.assert_close(stretched, (clip - normalised.min()) / (normalised.max() - normalised.min()))


def test_what_cannot_be_drawn_says_why():
    video = torch.rand(1, 3, 8, 32, 32)
    with pytest.raises(TypeError, match=r"Identity returned Tensor, expected \(prediction \[B, M, P\], MaskSample\)"):
        visualize.overview(nn.Identity(), video)
    with pytest.raises(TypeError, match=r"OwnMAE does not compute its loss.*expected the AdaMAELoss of your training"):
        visualize.overview(OwnMAE(), video)
    with pytest.raises(ValueError, match="clip=3, and the batch has 1"):
        visualize.overview(OwnMAE(), video, AdaMAELoss(**SIZES), clip=3)
    prediction, sample = OwnMAE()(video)
    with pytest.raises(ValueError, match=r"the mask has 64 tokens, and patches of \(2, 16, 16\).* into 16"):
        visualize.overview(video, prediction, sample, torch.rand(1, 48), normalize=False)
    with pytest.raises(ValueError, match=r"video has 6 channels, expected 1 \(grey\) or 3 \(RGB\); choose some"):
        visualize.mask_overview(torch.rand(1, 6, 8, 32, 32), {"a": sample}, **SIZES)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("adamae_sampler.visualize")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'adamae_sampler\[visualize\]'"):
        import adamae_sampler.visualize  # noqa: F401
