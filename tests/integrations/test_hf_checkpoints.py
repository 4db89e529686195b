"""Files of patched Hugging Face models: names that transformers leaves alone, files of older versions, resumed runs."""

import math
import re
import textwrap

import pytest
import safetensors.torch
import torch
from host_checks import grid_of
from hosts import make_hf_hiera, make_hf_videomae, make_hf_vit_mae
from test_huggingface import Clips, train_a_little, training_arguments

from adamae_sampler import AdaptiveTokenSampler, patch
from adamae_sampler.integrations import HostInterfaceError, patched_class
from adamae_sampler.networks import OLD_NAMES

transformers = pytest.importorskip("transformers")

each_host = pytest.mark.parametrize(
    ("make", "shape"),
    [(make_hf_videomae, (8, 3, 32, 32)), (make_hf_vit_mae, (3, 32, 32)), (make_hf_hiera, (3, 128, 128))],
    ids=["videomae", "vit_mae", "hiera"],
)
each_network = pytest.mark.parametrize("network", ["mha", "pooled", "mlp"])
OLD = {"transformers 4": ("mlp.fc1", "mlp.fc2"), "transformers 5": ("intermediate.dense", "output.dense")}


def under_old_names(weights, names):
    """Weights as versions before 0.3 had them."""
    first, second = names
    return {name.replace("mlp.expand", first).replace("mlp.shrink", second): each for name, each in weights.items()}


@each_host
@each_network
def test_a_file_has_the_names_of_the_sampler(make, shape, network, tmp_path):
    model = patch(make(), 0.75, network=network)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    own = model.sampler.state_dict(prefix="sampler.")
    assert {name for name in saved if name.startswith("sampler.")} == own.keys()
    assert all(torch.equal(saved[name], each) for name, each in own.items())


@pytest.mark.parametrize("network", ["mha", "pooled"])
@pytest.mark.parametrize("version", OLD)
def test_a_sampler_loads_weights_of_older_versions(network, version):
    model, other = (AdaptiveTokenSampler(32, (2, 4, 4), 0.75, network=network) for _ in range(2))
    old = under_old_names(model.state_dict(), OLD[version])
    assert any("expand" in name for name in model.state_dict())
    assert not any("expand" in name for name in old)
    before = list(old)
    other.load_state_dict(old)
    assert list(old) == before  # the caller's dictionary
    assert all(torch.equal(each, other.state_dict()[name]) for name, each in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**old, "network.blocks.0.mlp.fc3.weight": torch.zeros(1)})


@each_host
@pytest.mark.parametrize("version", OLD)
def test_from_pretrained_loads_files_of_older_versions(make, shape, version, tmp_path):
    model = patch(make().train(), 0.75)
    train_a_little(model, shape)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    sampler = {name: weights.pop(name) for name in list(weights) if name.startswith("sampler.")}
    safetensors.torch.save_file({**weights, **under_old_names(sampler, OLD[version])}, file, metadata={"format": "pt"})
    loaded = patched_class(type(model).host_class).from_pretrained(tmp_path)
    assert all(torch.equal(each, loaded.state_dict()[name]) for name, each in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys() | sampler.keys()
    assert not any(re.search(old, name) for name in again if name.startswith("sampler.") for old in OLD_NAMES)


@each_host
def test_a_resumed_trainer_has_the_samplers_weights(make, shape, tmp_path):
    model = patch(make(), 0.75)
    transformers.Trainer(model=model, args=training_arguments(tmp_path, 3), train_dataset=Clips(shape)).train()
    resumed = transformers.Trainer(
        model=patch(make(), 0.75), args=training_arguments(tmp_path, 3), train_dataset=Clips(shape)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # nothing is left to train
    for name, each in model.sampler.state_dict().items():
        assert torch.equal(each, resumed.model.sampler.state_dict()[name]), name


@each_host
def test_a_save_without_the_sampler_ends_in_advice_that_works(make, shape, tmp_path):
    patch(make(), 0.75).save_pretrained(tmp_path / "patched")
    host_class = type(make())
    plain = host_class.from_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")  # its configuration describes a sampler that the file lacks
    with pytest.raises(
        ValueError, match=rf"model = {host_class.__name__}\.from_pretrained\(folder\), then del"
    ) as caught:
        patched_class(host_class).from_pretrained(tmp_path / "plain")
    advice = re.search(r"(model = .*?folder\)), then (del \S+) and (patch\(model\))", str(caught.value))
    names = {host_class.__name__: host_class, "folder": tmp_path / "plain", "patch": patch}
    exec("\n".join(advice.groups()), names)
    assert names["model"].sampler.num_tokens == math.prod(grid_of(make()))
    names["model"].save_pretrained(tmp_path / "again")
    patched_class(host_class).from_pretrained(tmp_path / "again")


def test_auto_classes_are_told_to_name_the_class():
    with pytest.raises(TypeError, match=r"leaves the sampler out\. Name the class: patched_class\(VideoMAE"):
        patched_class(transformers.AutoModelForPreTraining)


@each_host
def test_evaluate_gives_the_hosts_loss(make, shape, tmp_path):
    model = patch(make(), 0.75)
    clips = Clips(shape)
    inputs = torch.stack([clips[i]["pixel_values"] for i in range(len(clips))])
    masks = model.eval().draw_mask(inputs).mask
    items = [{**clips[i], "mask": masks[i]} for i in range(len(clips))]
    found = transformers.Trainer(model=model, args=training_arguments(tmp_path, 1), eval_dataset=items).evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(model(inputs, mask=masks).loss.item(), rel=1e-4)


@each_host
def test_evaluate_without_masks_says_how_to_give_them(make, shape, tmp_path):
    model, clips = patch(make(), 0.75), Clips(shape)
    arguments = training_arguments(tmp_path, 1)
    with pytest.raises(ValueError, match='under the key "mask":') as caught:
        transformers.Trainer(model=model, args=arguments, eval_dataset=clips).evaluate()
    advice = str(caught.value).partition('"mask":\n')[2]
    names = {"model": model, "pixel_values": torch.stack([clips[i]["pixel_values"] for i in range(len(clips))])}
    exec(textwrap.dedent(advice), names)
    found = transformers.Trainer(model=model, args=arguments, eval_dataset=names["items"]).evaluate()
    assert found["eval_loss"] > 0


class PlainViTMAE(transformers.ViTMAEForPreTraining):
    """A subclass with a signature and an output of its own, as beast-backbones has."""

    def forward(self, pixel_values, noise=None, return_dict=None, return_recon=False):
        output = super().forward(pixel_values, noise)
        if return_recon:
            return {"loss": output.loss, "reconstructions": self.unpatchify(output.logits)}
        return {"latents": output.logits.mean(1), "loss": output.loss, "logits": output.logits}


def test_a_subclass_that_takes_and_returns_less():
    model = make_hf_vit_mae()
    model.__class__ = PlainViTMAE
    x = torch.randn(2, 3, 32, 32)
    output = patch(model.train(), 0.75)(x)
    output["loss"].backward()
    assert set(output) == {"latents", "loss", "logits"}
    torch.testing.assert_close(
        output["loss"].detach(), model.last_step.reconstruction + 1e-4 * model.last_step.sampling
    )
    with pytest.raises(HostInterfaceError, match="a loss and logits, and returned loss, reconstructions"):
        model(x, return_recon=True)
