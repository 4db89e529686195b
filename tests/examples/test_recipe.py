import csv
import dataclasses
import inspect
import itertools
from pathlib import Path

import pretrain
import pytest
from scripts import refused

from training.command_line import parse_arguments
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from training.recipe import PRESETS, load_preset, recipe_from
from training.schedule import Schedule


def test_every_preset_loads_and_unknown_ones_are_named():
    names = {path.stem for path in (PRESETS / "pretrain").glob("*.yaml")}
    assert names == {"bigbuckbunny", "demo", "k400", "ssv2", "ucf101", "hmdb51", "sprites"}
    for name in names:
        recipe = load_preset(PretrainRecipe, name)
        assert isinstance(recipe.img_size, tuple)
        assert recipe.plain()["img_size"] == list(recipe.img_size)
    with pytest.raises(
        ValueError, match="no preset 'imagenet'; there are bigbuckbunny, demo, hmdb51, k400, sprites, ssv2, ucf101"
    ):
        load_preset(PretrainRecipe, "imagenet")


def test_a_preset_with_a_stray_setting_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "bad.yaml").write_text("learning_rate: 1\nepochs: 2\noutput: x\n")
    monkeypatch.setattr("training.recipe.PRESETS", tmp_path)
    with pytest.raises(ValueError, match="sets learning_rate, which the recipe does not have"):
        load_preset(PretrainRecipe, "bad")


def test_an_estimator_without_a_sampler_is_refused():
    with pytest.raises(ValueError, match="estimator=plackett_luce has no effect: masking=tube learns no p"):
        PretrainRecipe(masking="tube", estimator="plackett_luce")


FAST = {"score_network": "pooled", "sample_from": "pixels", "decode_ratio": 0.5}


def settings_of(*arguments):
    recipe = parse_arguments(PretrainRecipe, list(arguments), "k400", None)[0]
    return recipe.fast, {name: getattr(recipe, name) for name in FAST}


def test_fast_stands_for_three_settings():
    paper = {"score_network": "mha", "sample_from": "tokens", "decode_ratio": 1.0}
    assert settings_of() == (False, paper)
    assert settings_of("--fast") == (True, FAST)
    assert settings_of("--decode-ratio", "0.5", "--fast") == (True, FAST)  # an option that agrees with --fast
    preset = load_preset(PretrainRecipe, "k400").plain()
    assert recipe_from(PretrainRecipe, {**preset, **FAST, "fast": True}).fast  # as in recipe.yaml
    for name in (*FAST, "fast"):
        del preset[name]
    short = recipe_from(PretrainRecipe, {**preset, "fast": True})  # as in a preset
    assert {name: getattr(short, name) for name in FAST} == FAST
    assert not recipe_from(PretrainRecipe, preset).fast  # as in the file of an earlier version


@pytest.mark.parametrize(
    ("option", "value"), [("score-network", "mha"), ("sample-from", "tokens"), ("decode-ratio", 1.0)]
)
def test_an_option_that_contradicts_fast_is_refused(option, value):
    """The refusal is one line, also for an option with its default value."""
    message = refused(pretrain.main, "--fast", f"--{option}", value, "--dry-run")
    name = option.replace("-", "_")
    assert message == (
        f"error: --{option} {value} contradicts --fast, which sets {name}={FAST[name]}; leave one of them out.\n"
    )


def test_fast_and_targets_are_refused_with_what_to_type():
    message = refused(pretrain.main, "--fast", "--target-ratio", "0.2", "--dry-run")
    assert message.endswith("use --score-network pooled --sample-from pixels --target-ratio 0.2.\n")


def test_fast_needs_adaptive_masking():
    message = refused(pretrain.main, "--fast", "--masking", "tube", "--dry-run")
    assert message == "error: --fast sets a score network, and --masking tube has none; leave one of them out.\n"


def test_learning_rate_follows_the_effective_batch_whatever_the_devices():
    recipe = load_preset(PretrainRecipe, "ssv2")
    for devices in (1, 8, 64):
        schedule = Schedule.of(recipe, clips=168_913, devices=devices)
        assert schedule.effective_batch == 2048
        assert schedule.accumulation == 64 // devices
        assert schedule.lr == pytest.approx(1.5e-4 * 2048 / 256)
        assert schedule.steps == 800 * (168_913 // 2048)  # an epoch has whole batches alone
        assert schedule.warmup_steps == 40 * (168_913 // 2048)
    with pytest.raises(ValueError, match=r"effective_batch=2048 is not a multiple of batch_size x devices = 32 x 3"):
        Schedule.of(recipe, 168_913, 3)


def test_warmup_then_cosine():
    recipe = PretrainRecipe(steps=101, warmup_steps=10, base_lr=1.0, min_base_lr=0.1, effective_batch=256)
    schedule = Schedule.of(recipe, clips=1000, devices=1)
    rates = [schedule.lr_at(step) for step in range(102)]
    assert rates[:10] == pytest.approx([i / 9 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55, abs=0.01)  # half-way down
    assert rates[101] == pytest.approx(0.1)  # after the last step
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


OFFICIAL = list(csv.DictReader((Path(__file__).parent.parent / "data" / "official_learning_rates.csv").open()))


@pytest.mark.parametrize("row", OFFICIAL, ids=lambda row: f"{row['kind']} {row['preset']}, {row['place']}")
def test_learning_rates_are_the_official_schedules(row):
    """For the numbers of training videos that the data sets have, and one device."""
    kind = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}[row["kind"]]
    schedule = Schedule.of(load_preset(kind, row["preset"]), int(row["videos"]), 1)
    assert schedule.steps == int(row["steps"])
    assert schedule.lr_at(int(row["step"])) == pytest.approx(float(row["lr"]), rel=1e-9, abs=1e-15)


def test_an_epoch_shorter_than_a_batch_counts_as_a_part_of_a_step():
    assert Schedule.of(PretrainRecipe(epochs=100, batch_size=64), clips=16, devices=1).steps == 25


def test_warmup_takes_at_most_half_of_a_run():
    schedule = Schedule.of(PretrainRecipe(steps=20, warmup_steps=20), 100, 1)
    assert (schedule.warmup_steps, schedule.shortened) == (10, True)
    assert not Schedule.of(PretrainRecipe(steps=40, warmup_steps=20), 100, 1).shortened
    assert Schedule.of(PretrainRecipe(steps=40, warmup_steps=1), 100, 1).lr_at(0) == 0
    one = Schedule.of(PretrainRecipe(steps=1, warmup_steps=5), 100, 1)
    assert one.lr_at(0) == one.lr


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe])
def test_a_recipe_survives_being_written(kind):
    for path in (PRESETS / kind.kind).glob("*.yaml"):
        recipe = load_preset(kind, path.stem)
        assert recipe_from(kind, recipe.plain()) == recipe


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe])
def test_every_setting_is_documented(kind):
    source = "".join(inspect.getsource(each) for each in kind.__mro__ if dataclasses.is_dataclass(each))
    for setting in dataclasses.fields(kind):
        after = source.split(f"    {setting.name}: ", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), setting.name
