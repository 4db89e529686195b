"""The examples for lightly and vit-pytorch, against the libraries' own models."""

from unittest import mock

import pytest
import timm
import torch
from hosts import random_sample
from torch import nn

from adamae_sampler import AdaMAELoss

lightly_mae = pytest.importorskip("lightly_mae", reason="needs lightly")
vit_pytorch_mae = pytest.importorskip("vit_pytorch_mae", reason="needs vit-pytorch")


@pytest.mark.parametrize("example", [lightly_mae, vit_pytorch_mae])
def test_it_trains(example):
    losses = example.main(steps=30)
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])


@pytest.mark.parametrize("sizes", [{}, {"channels": 1}, {"channels": 4}, {"image_size": (32, 64)}])
def test_vit_pytorchs_own_loss(sizes):
    """The ViT has mean pooling. With a class token, vit-pytorch's own MAE fails, since its position table has two axes."""
    vit = vit_pytorch_mae.ViT(
        **{
            "pool": "mean",
            "image_size": 32,
            "patch_size": 8,
            "num_classes": 2,
            "dim": 32,
            "depth": 2,
            "heads": 2,
            "mlp_dim": 32,
            **sizes,
        }
    )
    torch.manual_seed(1)
    ours = vit_pytorch_mae.AdaptiveMAE(encoder=vit, decoder_dim=16, decoder_heads=2, decoder_dim_head=8)
    theirs = vit_pytorch_mae.MAE(encoder=vit, decoder_dim=16, decoder_heads=2, decoder_dim_head=8)
    theirs.load_state_dict({name: each for name, each in ours.state_dict().items() if not name.startswith("sampler.")})
    height, width = sizes.get("image_size", (32, 32))
    images = torch.randn(2, sizes.get("channels", 3), height, width)
    tokens = height * width // 64
    sample = random_sample(2, tokens, tokens - int(0.75 * tokens))
    order = torch.cat([sample.masked_idx, sample.visible_idx], dim=1)  # vit-pytorch draws the masked ones first
    places = torch.arange(tokens).expand(2, -1)
    with mock.patch("torch.rand", return_value=torch.zeros(2, tokens).scatter_(1, order, places / tokens)):
        expected = theirs(images)
    prediction, got = ours(images, mask=sample)
    out = AdaMAELoss(patch_size=8, tubelet_size=1, normalize=False)(prediction, images.unsqueeze(2), got)
    torch.testing.assert_close(out.reconstruction, expected)
    out.loss.backward()
    assert all(each.grad is not None for each in ours.sampler.parameters())


def test_lightlys_class_token_is_always_kept():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = lightly_mae.AdaptiveLightlyMAE(vit, decoder_dim=16)
    images = torch.randn(2, 3, 32, 32)
    with mock.patch.object(model.backbone, "encode", wraps=model.backbone.encode) as encode:
        prediction, sample = model(images)
    idx_keep = encode.call_args.kwargs["idx_keep"]
    assert torch.equal(idx_keep[:, 0], torch.zeros(2, dtype=torch.long))
    assert torch.equal(idx_keep[:, 1:], sample.visible_idx + 1)
    assert prediction.shape == (2, 12, 192)
    # The model does not see a masked token: other pixels there change no prediction.
    row, column = divmod(int(sample.masked_idx[0, 0]), 4)
    images[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    with mock.patch.object(model, "sampler", Same(sample)):
        changed, _ = model(images)
    assert torch.equal(changed, prediction)


class Same(nn.Module):
    def __init__(self, sample):
        super().__init__()
        self.sample = sample

    def forward(self, tokens):
        return self.sample
