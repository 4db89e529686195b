"""The classifier: its computation, the files that it loads, and the parameter groups for fine-tuning."""

import pytest
import timm
import torch
from conftest import tiny_model
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.functional import layer_norm, linear

from adamae_sampler.models import VideoClassifier, load_checkpoint
from adamae_sampler.models.layers import sinusoid_table

SIZE = {"img_size": 32, "num_frames": 8, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_classifier(**kwargs):
    return VideoClassifier(**{**SIZE, "num_classes": 5, "head_init_scale": 1.0, **kwargs})


def test_it_is_a_vit_with_mean_pooling_and_fc_norm():
    model = tiny_classifier().eval()
    video = torch.randn(3, 3, 8, 32, 32)
    x = model.encoder.patch_embed(video) + sinusoid_table(64, 32)
    for block in model.encoder.blocks:
        x = sum(block(x))
    pooled = layer_norm(x.mean(1), (32,), model.fc_norm.weight, model.fc_norm.bias, eps=1e-6)
    expected = linear(pooled, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(video), expected)
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), pooled)
    features = tiny_classifier(num_classes=0)
    assert features(video).shape == (3, 32)


def test_features_equal_those_of_the_pre_training_encoder():
    """With all tokens visible and in order, the pre-training encoder gives the same features, apart from its last norm."""
    trained, model = tiny_model().eval(), tiny_classifier().eval()
    load_checkpoint(model, trained.state_dict(), only="encoder.")
    video = torch.randn(2, 3, 8, 32, 32)
    everything = torch.arange(64).expand(2, -1)
    expected = trained.encoder(trained.encoder.patch_embed(video), everything)
    torch.testing.assert_close(trained.encoder.norm(model.forward_features(video)), expected)


def test_models_of_the_registry():
    model = timm.create_model("adamae_vit_small_patch16_224", num_classes=7, img_size=32, num_frames=4, depth=1)
    assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 7)
    assert timm.create_model("adamae_vit_base_patch16_224", depth=1).num_features == 768
    assert timm.create_model("adamae_vit_large_patch16_224", depth=1).num_features == 1024
    with pytest.raises(ValueError, match="no weights to download"):
        timm.create_model("adamae_vit_base_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match=r"video has shape .* expected \[B, 3, 8, 32, 32\]"):
        tiny_classifier()(torch.zeros(1, 3, 8, 32, 16))


def test_an_encoder_is_loaded_whole_from_every_format_and_the_rest_is_reported(golden):
    official = golden.group("param/")
    names = ("img_size", "num_frames", "patch_size", "tubelet_size", "embed_dim", "depth", "num_heads")
    model = VideoClassifier(num_classes=3, **{name: golden.config[name] for name in names})
    head = model.head.weight.clone()
    report = load_checkpoint(model, official, only="encoder.")
    assert report.format == "official AdaMAE"
    assert set(report.matched) == {name for name in model.state_dict() if name.startswith("encoder.")}
    assert report.missing == ()
    assert {name.partition(".")[0] for name in report.left} >= {"decoder", "sampler"}
    assert torch.equal(model.encoder.patch_embed.proj.weight, official["encoder.patch_embed.proj.weight"])
    assert torch.equal(model.head.weight, head)


def test_fine_tuned_files_ours_and_videomaes():
    trained = tiny_classifier()
    ours = trained.state_dict()
    videomaes = {name.removeprefix("encoder."): tensor for name, tensor in ours.items()}
    for weights, name in ((ours, "VideoMAE (no sampler)"), (videomaes, "fine-tuned VideoMAE")):
        fresh = tiny_classifier()
        report = load_checkpoint(fresh, weights)
        assert (report.format, report.missing, report.unused) == (name, (), ())
        assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), ours.values(), strict=True))
        other_classes = tiny_classifier(num_classes=9)
        assert set(load_checkpoint(other_classes, weights, only="encoder.").left) >= {"head.weight", "fc_norm.bias"}
        with pytest.raises(ValueError, match=r"head.weight is \(5, 32\) in the file, \(9, 32\) in the model"):
            load_checkpoint(other_classes, weights)


def test_files_that_do_not_fit_are_refused():
    weights = tiny_model().state_dict()
    decoder = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
    with pytest.raises(ValueError, match="none of the formats known"):
        load_checkpoint(tiny_classifier(), decoder, only="encoder.")
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight is \(32, 3, 2, 8, 8\) in the file, \(48, "):
        load_checkpoint(tiny_classifier(embed_dim=48), weights, only="encoder.")
    with pytest.raises(ValueError, match="lacks 13 of the model's"):
        load_checkpoint(tiny_classifier(depth=3), weights, only="encoder.")
    with pytest.raises(ValueError, match="deeper than the model"):
        load_checkpoint(tiny_classifier(depth=1), weights, only="encoder.")
    with pytest.raises(ValueError, match=r"only='enc\.' matches no parameter"):
        load_checkpoint(tiny_classifier(), weights, only="enc.")


def test_layer_decay_and_weight_decay_groups_by_hand():
    """BEiT's rule: 0.75 ** (layers above). The patch embedding is layer 0, block i is layer i + 1, the head is the last."""
    model = tiny_classifier(depth=3)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    power = {"encoder.patch_embed": 4, "encoder.blocks.0": 3, "encoder.blocks.1": 2, "encoder.blocks.2": 1}
    power |= {"fc_norm": 0, "head": 0}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        scale, decay = found[id(parameter)]
        (expected,) = (0.75**n for prefix, n in power.items() if name.startswith(prefix))
        assert scale == pytest.approx(expected, rel=1e-12), name
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.05), name


def test_drop_path_rises_linearly_and_drops_whole_clips():
    model = tiny_classifier(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    block = tiny_classifier(depth=2, drop_path_rate=0.5).encoder.blocks[1].train()
    nn.init.zeros_(block.mlp.fc2.weight)  # leaves the attention branch alone
    nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(1, 6, 32).expand(4000, -1, -1)
    branch = block.attn(block.norm1(x[:1]))
    added = sum(block(x)) - x
    dropped = added.flatten(1).abs().amax(1) == 0
    assert 0.47 < dropped.float().mean() < 0.53
    torch.testing.assert_close(added[~dropped], (2 * branch).expand_as(added[~dropped]), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    video = torch.randn(2, 3, 8, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = tiny_classifier()
        model.set_grad_checkpointing(checkpointed)
        model(video).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_hugging_faces_classifier_gives_its_logits_here():
    """Releases such as transformers 5.12 add biases of keys. These change no output and may be in the file."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, use_mean_pooling=True, num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    theirs.fc_norm.eps = 1e-6  # theirs is 1e-5
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = tiny_classifier().eval()
    weights = theirs.state_dict()
    biases = {
        name.replace("query.weight", "key.bias"): torch.randn(32)
        for name in weights
        if name.endswith("attention.attention.query.weight")
    }
    assert len(biases) == 2
    report = load_checkpoint(ours, {**weights, **biases})
    assert (report.format, report.missing, report.unused) == ("Hugging Face VideoMAE", (), ())
    video = torch.randn(2, 3, 8, 32, 32)
    torch.testing.assert_close(ours(video), theirs(video.transpose(1, 2)).logits, rtol=1e-4, atol=1e-4)
