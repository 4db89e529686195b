"""Weight decay, layer-wise decay and initialisation of ViT-B, against figures of the official models.

tests/data/official_parameters.csv was computed from the official code, see the README beside it.
"""

import csv
from pathlib import Path

import pytest
import timm
import torch

from pipelines import finetuning, pretraining
from training.cuda_graph import set_learning_rates
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from training.recipe import load_preset

DATA = Path(__file__).parent.parent / "data"
ROWS = list(csv.DictReader((DATA / "official_parameters.csv").open()))
RATES = list(csv.DictReader((DATA / "official_learning_rates.csv").open()))
PRETRAIN_NAMES = {
    "sampler.network.pos_embed": "encoder.pos_embed_probs",
    "sampler.network.blocks.0.mlp.expand": "encoder.get_token_probs.0.mlp.fc1",
    "sampler.network.blocks.0.mlp.shrink": "encoder.get_token_probs.0.mlp.fc2",
    "sampler.network.blocks.0": "encoder.get_token_probs.0",
    "sampler.network.head": "encoder.get_token_probs.1",
}


def official_name(kind, name):
    if kind == "finetune":
        return name.removeprefix("encoder.")
    for ours, official in PRETRAIN_NAMES.items():
        if name.startswith(ours):
            return name.replace(ours, official)
    return name


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def model_groups_rows(request):
    """A model as its script builds it for SSv2, the optimizer's groups, and the official rows by name."""
    script = {"pretrain": pretraining, "finetune": finetuning}[request.param]
    torch.manual_seed(0)
    if request.param == "pretrain":
        recipe = load_preset(PretrainRecipe, "ssv2")
        model = timm.create_model(recipe.model, **recipe.model_args())
    else:
        recipe = load_preset(FinetuneRecipe, "ssv2")
        model = timm.create_model(recipe.model, **recipe.model_args(174))
    rows = {row["parameter"]: row for row in ROWS if row["model"] == request.param}
    parameters = {official_name(request.param, name): each for name, each in model.named_parameters()}
    return parameters, script.parameter_groups(recipe, model), rows


def test_the_parameters_are_the_official_ones(model_groups_rows):
    parameters, _, rows = model_groups_rows
    shapes = {name: "x".join(map(str, each.shape)) for name, each in parameters.items()}
    assert shapes == {name: row["shape"] for name, row in rows.items()}


def test_the_official_rule_says_which_parameters_decay_and_how_fast_they_learn(model_groups_rows):
    parameters, groups, rows = model_groups_rows
    found = {id(p): (group["weight_decay"], group.get("lr_scale", 1.0)) for group in groups for p in group["params"]}
    assert len(found) == len(parameters)
    for name, each in parameters.items():
        decay, scale = found[id(each)]
        assert decay == (0.05 if rows[name]["decays"] == "1" else 0.0), name
        assert scale == pytest.approx(float(rows[name]["lr_scale"]), rel=1e-5), name


def test_the_optimizers_rates_are_the_official_ones(model_groups_rows):
    """The schedule's rate, which test_recipe compares with the official one, times the factor of each layer."""
    parameters, groups, rows = model_groups_rows
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = [row for row in RATES if row["preset"] == "ssv2" and row["kind"] == next(iter(rows.values()))["model"]]
    assert len(schedule) == 5
    for row in schedule:
        set_learning_rates(optimizer, float(row["lr"]))
        found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, each in parameters.items():
            wanted = float(row["lr"]) * float(rows[name]["lr_scale"])
            assert found[id(each)] == pytest.approx(wanted, rel=1e-5, abs=1e-15), (name, row["place"])


def test_initial_deviations_are_the_official_ones(model_groups_rows):
    """Within five standard errors of the difference between two draws."""
    parameters, _, rows = model_groups_rows
    for name, each in parameters.items():
        wanted, values = float(rows[name]["deviation"]), each.detach().double()
        if wanted == 0:  # constants: biases 0, norms 1
            assert (values == float(rows[name]["mean"])).all(), name
        else:
            assert float(values.std()) == pytest.approx(wanted, rel=5 / each.numel() ** 0.5 + 1e-3), name


def test_the_projection_to_the_decoder_keeps_the_deviation_of_a_linear_layer():
    """0.577 for inputs of deviation 1, as the official model's; Xavier's initialisation gives 1.155."""
    torch.manual_seed(0)
    layer = timm.create_model("pretrain_adamae_vit_base_patch16_224", depth=1, decoder_depth=1).encoder_to_decoder
    assert float(layer(torch.randn(2000, 768)).std()) == pytest.approx(0.577, abs=0.005)
