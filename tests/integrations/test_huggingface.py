"""The Hugging Face hosts: configuration, saving and loading, Trainer, and weights from and for the reference model."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from conftest import tiny_model
from host_checks import grid_of
from hosts import CASES, checkout, import_from, make_hf_hiera, make_hf_videomae, make_hf_vit_mae, structured

from adamae_sampler import RandomTokenSampler, patch, unpatch
from adamae_sampler.integrations import patched_class
from adamae_sampler.models import load_checkpoint, save_encoder

transformers = pytest.importorskip("transformers")

VITS = [(make_hf_videomae, (8, 3, 32, 32), "bool_masked_pos"), (make_hf_vit_mae, (3, 32, 32), "mask")]
HIERA = (make_hf_hiera, (3, 128, 128), "mask")
each_host = pytest.mark.parametrize(("make", "shape", "argument"), [*VITS, HIERA], ids=["videomae", "vit_mae", "hiera"])
each_vit = pytest.mark.parametrize(("make", "shape", "argument"), VITS, ids=["videomae", "vit_mae"])


@pytest.fixture(autouse=True)
def _leave_no_precision_behind():
    """Resets Accelerate. A Trainer sets its precision for the whole process, and scripts under test choose their own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train_a_little(model, shape):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        model(structured(2, shape, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@each_host
def test_save_and_load_keep_the_sampler(make, shape, argument, tmp_path):
    model = patch(make().train(), 0.8, network="mlp", sampling_weight=1e-3)
    train_a_little(model, shape)
    model.save_pretrained(tmp_path)
    host_class = type(model).host_class
    loaded = patched_class(host_class).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.sampler.mask_ratio == 0.8
    assert loaded.sampling_weight == 1e-3
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, each in model.state_dict().items():
        assert torch.equal(each, state[name]), name
    x = structured(2, shape)
    sample = model.eval().draw_mask(x)
    assert torch.equal(model(x, **{argument: sample}).logits, loaded.eval()(x, **{argument: sample}).logits)
    assert torch.equal(model.draw_mask(x).log_probs, loaded.draw_mask(x).log_probs)
    train_a_little(loaded.train(), shape)
    unpatch(loaded)
    assert type(loaded) is host_class
    assert not hasattr(loaded.config, "adaptive_masking")


@each_host
def test_loading_without_the_sampler_is_noticed(make, shape, argument, tmp_path):
    patch(make(), 0.8).save_pretrained(tmp_path)
    host_class = type(make())
    plain = host_class.from_pretrained(tmp_path)  # the host's own way: it leaves the sampler out
    with pytest.raises(ValueError, match=rf"patched_class\({host_class.__name__}\)\.from_pretrained"):
        patch(plain)
    assert type(plain) is host_class
    del plain.config.adaptive_masking
    patch(plain)

    make().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no adaptive_masking.*then patch\(model\)"):
        patched_class(host_class).from_pretrained(tmp_path / "plain")

    model = make()
    patch(model, sampler=RandomTokenSampler(grid_of(model), 0.75))
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="RandomTokenSampler"):
        patched_class(host_class).from_pretrained(tmp_path / "own")


def test_patched_class_is_for_hugging_face():
    with pytest.raises(TypeError, match="expected a Hugging Face class"):
        patched_class(torch.nn.Linear)


def test_p_of_videomae_b_starts_uniform():
    model = patch(transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig()), 0.9).eval()
    log_probs = model.draw_mask(torch.randn(1, 16, 3, 224, 224)).log_probs
    assert -(log_probs.exp() * log_probs).sum().item() == pytest.approx(math.log(1568), abs=1e-4)
    assert log_probs.exp().max().item() == pytest.approx(1 / 1568, rel=1e-4)


class Clips(torch.utils.data.Dataset):
    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": structured(1, self.shape, index)[0]}


def training_arguments(folder, steps, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=steps, learning_rate=1e-3, logging_steps=1,
        save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


@each_host
def test_trainer_runs_unchanged(make, shape, argument, tmp_path):
    model = patch(make(), 0.75)
    before = {name: each.clone() for name, each in model.sampler.state_dict().items()}
    trainer = transformers.Trainer(model=model, args=training_arguments(tmp_path, 3), train_dataset=Clips(shape))
    trainer.train()
    assert all(
        not torch.equal(each, before[name]) for name, each in model.sampler.named_parameters() if "bias" not in name
    )
    history = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert len(history) == 3

    resumed = transformers.Trainer(
        model=patch(make(), 0.75), args=training_arguments(tmp_path, 5), train_dataset=Clips(shape)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    saved = patched_class(type(model).host_class).from_pretrained(tmp_path / "checkpoint-3")
    for name, each in model.sampler.state_dict().items():
        assert torch.equal(each, saved.sampler.state_dict()[name])


@each_host
def test_gradient_checkpointing_gives_the_same_gradients(make, shape, argument):
    torch.manual_seed(0)
    model = patch(make(), 0.75).train()
    x = structured(2, shape)
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model.zero_grad()
        model(x).loss.backward()
        grads.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, each in grads[0].items():
        assert torch.equal(each, grads[1][name]), name


@each_vit
def test_outputs_as_a_tuple(make, shape, argument):
    model = patch(make(), 0.75).eval()
    x = structured(2, shape)
    sample = model.draw_mask(x)
    named = model(x, **{argument: sample})
    plain = model(x, **{argument: sample}, return_dict=False)
    assert isinstance(plain, tuple)
    assert all(torch.equal(one, other) for one, other in zip(plain, named.to_tuple(), strict=True))
    hidden = model(x, **{argument: sample}, output_hidden_states=True).hidden_states
    assert hidden[-1].shape[1] == sample.num_visible + (argument == "mask")  # ViTMAE has a class token


def test_noise_is_refused():
    model = patch(make_hf_vit_mae(), 0.75)
    with pytest.raises(ValueError, match="noise chooses the host's random mask"):
        model(torch.randn(2, 3, 32, 32), noise=torch.rand(2, 64))


def test_features_of_the_encoder_are_the_hosts():
    x = torch.randn(2, 8, 3, 32, 32)
    model = make_hf_videomae().eval()
    expected = model.videomae(x).last_hidden_state
    assert torch.equal(patch(model).videomae(x).last_hidden_state, expected)


def test_both_hosts_are_in_the_table_of_cases():
    assert {"hf_videomae", "hf_vit_mae"} <= {case.name for case in CASES}


# ---- weights of the reference model ----


def huggingface_like(model, **options):
    """A Hugging Face model with the sizes and the norm epsilon of a reference model."""
    encoder, decoder = model.encoder.blocks[0], model.decoder.blocks[0]
    return make_hf_videomae(
        image_size=model.size.video[2], patch_size=model.size.patch[0], num_frames=model.size.video[1],
        num_hidden_layers=len(model.encoder.blocks), num_attention_heads=encoder.attn.num_heads,
        hidden_size=encoder.mlp.fc1.in_features, intermediate_size=encoder.mlp.fc1.out_features,
        decoder_hidden_size=decoder.mlp.fc1.in_features, decoder_num_hidden_layers=len(model.decoder.blocks),
        decoder_num_attention_heads=decoder.attn.num_heads, decoder_intermediate_size=decoder.mlp.fc1.out_features,
        layer_norm_eps=1e-6, **options,
    )  # fmt: skip


def randomized(model):
    for each in model.parameters():
        torch.nn.init.normal_(each, std=0.2)  # biases too, which are initialised to zero
    return model.eval()


def of_old_layout(state):
    names = {"attention.attention.query.bias": "attention.attention.q_bias", "value.bias": "v_bias"}
    for new, old in names.items():
        state = {name.replace(new, old): each for name, each in state.items()}
    return state


def of_new_layout(state):
    names = {"attention.attention.q_bias": "attention.attention.query.bias", "attention.v_bias": "attention.value.bias"}
    for old, new in names.items():
        state = {name.replace(old, new): each for name, each in state.items()}
    return state


@pytest.mark.parametrize("layout", [of_old_layout, of_new_layout])
def test_hugging_face_weights_give_hugging_faces_outputs(layout):
    ours = tiny_model().eval()
    theirs = randomized(huggingface_like(ours))
    theirs.decoder.norm.eps = 1e-6  # theirs is 1e-5
    report = load_checkpoint(ours, layout(theirs.state_dict()))
    assert report.format == "Hugging Face VideoMAE"
    assert all(name.startswith("sampler.") for name in report.missing)
    assert report.unused == ()
    video = torch.randn(2, 3, 8, 32, 32)
    prediction, sample = ours(video)
    expected = theirs(video.transpose(1, 2), bool_masked_pos=sample.mask)
    torch.testing.assert_close(prediction, expected.logits, rtol=1e-5, atol=1e-5)


def test_a_patched_hugging_face_model_brings_its_sampler(tmp_path):
    ours = tiny_model()
    theirs = patch(huggingface_like(ours), 0.75)
    train_a_little(theirs, (8, 3, 32, 32))
    theirs.save_pretrained(tmp_path)
    report = load_checkpoint(ours, tmp_path / "model.safetensors")
    assert report.format == "Hugging Face VideoMAE"
    assert (report.missing, report.unused) == ((), ())
    for name, each in ours.sampler.state_dict().items():
        assert torch.equal(each, theirs.sampler.state_dict()[name])


def test_an_encoder_alone_or_of_another_size_is_refused():
    ours = tiny_model()
    theirs = huggingface_like(ours)
    with pytest.raises(
        ValueError, match=r"lacks \d+ of the model's \d+ parameters: encoder_to_decoder|lacks .* decoder"
    ):
        load_checkpoint(ours, theirs.videomae.state_dict())
    report = load_checkpoint(
        ours, theirs.videomae.state_dict(), allow_missing=("decoder.", "mask_token", "encoder_to_decoder")
    )
    assert sum(name.startswith("encoder.") for name in report.matched) == len(ours.encoder.state_dict())
    with pytest.raises(ValueError, match="of another architecture"):
        load_checkpoint(tiny_model(embed_dim=64), theirs.state_dict())


@pytest.mark.parametrize("sizes", [{}, {"img_size": (16, 40)}, {"in_chans": 1}, {"num_frames": 16}])
def test_hugging_face_loads_our_encoder(tmp_path, sizes):
    ours = randomized(tiny_model(**sizes))
    save_encoder(ours, tmp_path / "encoder")
    theirs, info = transformers.VideoMAEModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    video = torch.randn(2, *ours.size.video)
    tokens = ours.encoder.patch_embed(video)
    everything = torch.arange(tokens.shape[1]).expand(2, -1)
    expected = ours.encoder(tokens, everything)
    got = theirs.eval()(video.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    classifier = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "encoder", num_labels=5)
    assert classifier(video.transpose(1, 2)).logits.shape == (2, 5)
    reloaded = tiny_model(**sizes)
    load_checkpoint(
        reloaded,
        tmp_path / "encoder" / "model.safetensors",
        allow_missing=("decoder.", "mask_token", "encoder_to_decoder"),
    )
    for name, each in reloaded.encoder.state_dict().items():
        assert torch.equal(each, ours.encoder.state_dict()[name])


def test_the_encoder_in_videomaes_format(tmp_path):
    """The file has the format of VideoMAE's fine-tuning: the keys of its VisionTransformer, under "model"."""
    ours = randomized(tiny_model(num_frames=16))
    save_encoder(ours, tmp_path / "encoder.pth", "videomae")
    weights = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias", "norm.weight"} <= set(
        weights
    )


@pytest.mark.skipif(checkout("VideoMAE") is None, reason="ADAMAE_SAMPLER_HOSTS names no folder with VideoMAE")
def test_videomae_loads_our_encoder(tmp_path):
    ours = randomized(tiny_model(num_frames=16))
    save_encoder(ours, tmp_path / "encoder.pth", "videomae")
    weights = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    module = import_from(checkout("VideoMAE"), "modeling_finetune")
    theirs = module.VisionTransformer(
        img_size=32, patch_size=8, num_classes=4, embed_dim=32, depth=2, num_heads=2, qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6), use_mean_pooling=False,
    ).eval()  # fmt: skip
    found = theirs.load_state_dict(weights, strict=False)
    assert {name.split(".")[0] for name in found.missing_keys} == {"head"}
    assert found.unexpected_keys == []
    video = torch.randn(2, 3, 16, 32, 32)
    tokens = ours.encoder.patch_embed(video)
    expected = ours.encoder(tokens, torch.arange(tokens.shape[1]).expand(2, -1))
    torch.testing.assert_close(theirs.forward_features(video), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_save_encoder_refuses_bad_arguments(tmp_path):
    model = tiny_model()
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        save_encoder(model, tmp_path / "there")
    with pytest.raises(ValueError, match="format='timm', expected 'huggingface' or 'videomae'"):
        save_encoder(model, tmp_path / "new", "timm")
    with pytest.raises(TypeError, match=r"model is DataParallel, expected AdaMAE \(pass model.module"):
        save_encoder(torch.nn.DataParallel(model), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@each_host
def test_a_configuration_that_models_share_is_not_changed(make, shape, argument, tmp_path):
    first = make()
    config = first.config
    second, third = (type(first)(config) for _ in range(2))
    before = config.to_dict()
    patch(first, 0.75)
    patch(second, 0.75)
    assert config.to_dict() == before
    first.sampling_weight = 0.5  # the current value is saved
    first.save_pretrained(tmp_path / "patched")
    assert not hasattr(config, "adaptive_masking")
    assert patched_class(type(third)).from_pretrained(tmp_path / "patched").sampling_weight == 0.5
    third.save_pretrained(tmp_path / "plain")
    assert "adaptive_masking" not in (tmp_path / "plain" / "config.json").read_text()


@each_host
def test_weights_without_the_sampler_are_refused(make, shape, argument, tmp_path):
    patch(make(), 0.8).save_pretrained(tmp_path / "patched")
    plain = type(make()).from_pretrained(tmp_path / "patched")  # keeps the configuration, drops the sampler
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"the file lacks \d+ weights of the sampler"):
        patched_class(type(plain)).from_pretrained(tmp_path / "plain")


@each_vit
def test_the_mask_under_either_name_and_the_ratio(make, shape, argument):
    model = patch(make(), 0.75).eval()
    x = structured(2, shape)
    sample = model.draw_mask(x)
    first, second = (model(x, **{name: sample}).logits for name in ("mask", "bool_masked_pos"))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="got both mask and bool_masked_pos"):
        model(x, mask=sample, bool_masked_pos=sample)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.5, but the model was patched for 0\.75"):
        model(x, mask=sample, mask_ratio=0.5)


def test_the_class_of_a_patched_model_is_taken_too():
    model = patch(make_hf_videomae(), 0.75)
    assert patched_class(type(model)) is type(model)


def test_unpatch_refuses_the_forward_that_a_bf16_trainer_leaves(tmp_path):
    clips = [{"pixel_values": structured(1, (3, 32, 32), seed)[0]} for seed in range(4)]
    arguments = {"output_dir": str(tmp_path), "max_steps": 1, "bf16": True, "report_to": [], "use_cpu": True}
    model = patch(make_hf_vit_mae(), 0.75)
    trainer = transformers.Trainer(model=model, args=transformers.TrainingArguments(**arguments), train_dataset=clips)
    trainer.train()
    with pytest.raises(TypeError, match="Undo that first"):
        unpatch(model)
    unpatch(extract_model_from_parallel(model, keep_fp32_wrapper=False))
    model(clips[0]["pixel_values"][None])


def test_a_folder_and_mean_pooling(tmp_path):
    ours = tiny_model()
    huggingface_like(ours).save_pretrained(tmp_path)
    assert load_checkpoint(ours, tmp_path).format == "Hugging Face VideoMAE"
    with pytest.raises(ValueError, match=r"use_mean_pooling=True has no encoder\.norm"):
        load_checkpoint(ours, huggingface_like(ours, use_mean_pooling=True).state_dict())
    with pytest.raises(ValueError, match="is named like a file"):
        save_encoder(ours, tmp_path / "encoder.pth")
