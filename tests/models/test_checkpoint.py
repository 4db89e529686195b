import argparse

import pytest
import safetensors.torch
import torch
from conftest import tiny_model

from adamae_sampler.models import load_checkpoint


def renamed_as_official(state):
    names = {
        "sampler.network.pos_embed": "encoder.pos_embed_probs",
        "sampler.network.blocks.0.": "encoder.get_token_probs.0.",
        "sampler.network.head.": "encoder.get_token_probs.1.",
    }
    for ours, official in names.items():
        state = {name.replace(ours, official): tensor for name, tensor in state.items()}
    return state


def as_videomae(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("sampler.")}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_our_own_and_official_files(tmp_path):
    trained = tiny_model()
    for convert, name in ((dict, "adamae_sampler"), (renamed_as_official, "official AdaMAE")):
        weights = convert(trained.state_dict())
        safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
        torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "weights.pth")
        for source in (weights, tmp_path / "weights.safetensors", str(tmp_path / "weights.pth")):
            fresh = tiny_model()
            assert not equal(fresh, trained)
            report = load_checkpoint(fresh, source)
            assert equal(fresh, trained)
            assert report.format == name
            assert (len(report.matched), report.missing, report.unused) == (len(weights), (), ())


def test_a_videomae_file_leaves_the_sampler_as_it_is_and_says_so():
    trained, fresh = tiny_model(), tiny_model()
    before = {name: each.clone() for name, each in fresh.sampler.state_dict().items()}
    report = load_checkpoint(fresh, as_videomae(trained.state_dict()))
    assert report.format == "VideoMAE (no sampler)"
    assert report.missing == tuple(f"sampler.{name}" for name in before)
    assert all(torch.equal(before[name], each) for name, each in fresh.sampler.state_dict().items())
    assert torch.equal(fresh.decoder.head.weight, trained.decoder.head.weight)
    assert "left as they were: sampler.network.pos_embed" in str(report)
    fixed = tiny_model(masking="tube")
    assert load_checkpoint(fixed, as_videomae(trained.state_dict())).missing == ()


def test_an_adaptive_file_in_a_model_with_a_fixed_mask_reports_what_is_left_over():
    report = load_checkpoint(tiny_model(masking="random"), tiny_model().state_dict())
    assert all(name.startswith("sampler.") for name in report.unused)
    assert "in the file, not in the model: sampler.network.pos_embed" in str(report)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("container", [None, "model", "state_dict", "module"])
def test_wrappers_of_files_are_stripped(prefix, container):
    trained, fresh = tiny_model(), tiny_model()
    weights = {prefix + name: tensor for name, tensor in trained.state_dict().items()}
    load_checkpoint(fresh, {container: weights, "epoch": 1} if container else weights)
    assert equal(fresh, trained)


def test_a_compiled_model_is_loaded_too():
    trained, fresh = tiny_model(), tiny_model()
    load_checkpoint(torch.compile(fresh), trained.state_dict())
    assert equal(fresh, trained)


def test_a_refused_file_leaves_the_model_unchanged(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "hook": print}, tmp_path / "code.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk" * 100)
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    model = tiny_model()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    deeper = tiny_model(depth=3).state_dict()
    encoder_only = {name: each for name, each in before.items() if name.startswith("encoder.")}
    shallow = {name: each for name, each in before.items() if "encoder.blocks.1" not in name}
    cases = [
        (ValueError, "another architecture; .* shapes differ", tiny_model(embed_dim=64).state_dict()),
        (ValueError, "another architecture", tiny_model(num_frames=16).state_dict()),
        (ValueError, r"lacks .* encoder.blocks.1.*allow_missing", shallow),
        (ValueError, "lacks .* decoder", encoder_only),
        (ValueError, "deeper than the model: it also has encoder.blocks.2.", deeper),
        (ValueError, "none of the formats known", {"conv1.weight": torch.zeros(3)}),
        (ValueError, "none of the formats known", {}),
        (TypeError, r"holds note \(str\) where tensors were expected", {**before, "note": "x"}),
        (FileNotFoundError, "no checkpoint at", tmp_path / "missing.pth"),
        (ValueError, "code.pth cannot be read .* never unpickled", tmp_path / "code.pth"),
        (ValueError, "text.safetensors cannot be read", tmp_path / "text.safetensors"),
        (ValueError, "junk.pth cannot be read", tmp_path / "junk.pth"),
    ]
    for kind, message, source in cases:
        with pytest.raises(kind, match=message):
            load_checkpoint(model, source)
        assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    report = load_checkpoint(
        model, encoder_only, allow_missing=("decoder.", "sampler.", "mask_token", "encoder_to_decoder")
    )
    assert "decoder.head.weight" in report.missing
