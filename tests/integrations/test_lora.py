"""Patched hosts with peft's LoRA."""

import warnings

import pytest
import torch
from hosts import make_hf_videomae, make_hf_vit_mae, make_mae, structured

from adamae_sampler import RandomTokenSampler, patch, unpatch
from adamae_sampler.integrations.patched import Patched

peft = pytest.importorskip("peft")

each_host = pytest.mark.parametrize(
    ("make", "shape"),
    [(make_hf_videomae, (8, 3, 32, 32)), (make_hf_vit_mae, (3, 32, 32))],
    ids=["videomae", "vit_mae"],
)


def with_lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options)).train()


@each_host
def test_the_sampler_trains_and_is_saved_with_the_adapter(make, shape, tmp_path):
    host = make()
    weights = {name: each.clone() for name, each in host.state_dict().items()}
    model = with_lora(patch(host, 0.75), modules_to_save=["sampler"])
    assert not any("lora" in name for name, _ in host.sampler.named_parameters())
    before = {name: each.clone() for name, each in host.sampler.named_parameters() if each.requires_grad}
    assert before
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for seed in range(5):
        model(pixel_values=structured(2, shape, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(host.sampler.named_parameters())
    assert all(not torch.equal(each, after[name]) for name, each in before.items() if "bias" not in name)

    model.save_pretrained(tmp_path)
    fresh = make()
    fresh.load_state_dict(weights)
    loaded = peft.PeftModel.from_pretrained(patch(fresh, 0.75), tmp_path)
    x = structured(2, shape)
    sample = host.eval().draw_mask(x)
    log_probs = sample.log_probs
    torch.testing.assert_close(loaded.get_base_model().eval().draw_mask(x).log_probs, log_probs)
    assert log_probs.std() > 0
    one, other = (each(pixel_values=x, mask=sample).logits for each in (model.eval(), loaded.eval()))
    torch.testing.assert_close(one, other)
    merged = unpatch(model.merge_and_unload())
    assert not any(isinstance(each, Patched) for each in merged.modules())


def test_a_frozen_sampler_is_named_once():
    x = torch.randn(2, 3, 32, 32)
    model = patch(make_hf_vit_mae().train(), 0.75)
    with_lora(model, exclude_modules=r".*sampler.*")
    with pytest.warns(UserWarning, match=r'no trainable parameter.*modules_to_save=\["sampler"\]') as caught:
        model(x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x)
        patch(make_mae().train())(x)
        patch(make_mae().train(), sampler=RandomTokenSampler((1, 8, 8), 0.75))(x)  # it has nothing to train
        frozen = patch(make_mae().eval())
        frozen.sampler.requires_grad_(False)
        frozen(x, mask=frozen.draw_mask(x))  # evaluation
    with pytest.warns(UserWarning, match=r"model\.sampler\.requires_grad_\(True\)"):
        frozen.train()(x)


def test_a_peft_model_is_patched_before_it_is_wrapped():
    wrapped = with_lora(make_hf_vit_mae())
    with pytest.raises(
        TypeError, match=r"it wraps a ViTMAEForPreTraining. Patch that first.*modules_to_save=\['sampler'\]"
    ):
        patch(wrapped)
    with pytest.raises(TypeError, match="It wraps a ViTMAEForPreTraining: unpatch that"):
        unpatch(with_lora(patch(make_hf_vit_mae()), modules_to_save=["sampler"]))
