"""Presets against the sources of their settings: tests/data/paper_settings.csv, and the page that lists differences."""

import csv
import re
import sys
from pathlib import Path

import pytest
import yaml

from common.command_line import parse_settings
from evaluation.settings import ProbeSettings
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe
from training.recipe import load_preset

ROOT = Path(__file__).parent.parent.parent
SOURCES = list(csv.DictReader((ROOT / "tests" / "data" / "paper_settings.csv").open()))
RECIPES = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}


def table_3_options():
    """The options of the Table 3 command in examples/docs/results.md."""
    text = (ROOT / "examples" / "docs" / "results.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"examples/linear_probe\.py (.*)", text)
    arguments = command.split()
    del arguments[arguments.index("--checkpoint") :][:2]
    options = [each for at, each in enumerate(arguments) if "--checkpoint" not in (each, arguments[max(at - 1, 0)])]
    return parse_settings(ProbeSettings(), options, None)


def value_of(kind, preset, setting):
    if kind != "probe":
        return load_preset(RECIPES[kind], preset).plain()[setting]
    options = table_3_options()
    # test_the_probes_recipe_is_videomaes records these of the optimizer.
    fixed = {"batch_size": 1024, "base_lr": 0.1, "momentum": 0.9, "weight_decay": 0, "warmup_epochs": 10}
    return fixed[setting] if setting in fixed else getattr(options.probe if setting == "epochs" else options, setting)


def differences_listed():
    """{(kind, preset, setting): what the source has}, of the table "Where we differ" of examples/docs/paper.md."""
    page = (ROOT / "examples" / "docs" / "paper.md").read_text()
    section = page.split("## Where we differ", 1)[1].split("\n## ", 1)[0]
    found = {}
    for first, theirs in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", section, re.MULTILINE):
        kind, presets, settings = re.fullmatch(r"`(\w+)` ([\w, ]+): (.*)", first).groups()
        for preset in presets.split(", "):
            for setting in re.findall(r"`(\w+)`", settings):
                found.setdefault((kind, preset, setting), []).append(theirs)
    return found


def differing():
    """The rows whose value is not the preset's."""
    rows = []
    for row in SOURCES:
        ours, theirs = value_of(row["kind"], row["preset"], row["setting"]), yaml.safe_load(row["value"])
        theirs = None if theirs == "None" else theirs
        if ours != theirs and str(ours) != row["value"]:
            rows.append(row)
    return rows


def test_each_difference_from_a_source_is_listed():
    listed = differences_listed()
    for row in differing():
        key = row["kind"], row["preset"], row["setting"]
        assert key in listed, f"{key} is {value_of(*key)}, and {row['value']} in {row['source']}"
        stated = "; ".join(listed[key])
        assert row["value"].lower() in stated.lower(), f"{key}: {row['source']} has {row['value']}, the page {stated}"


def test_nothing_is_listed_that_is_no_difference():
    there = {(row["kind"], row["preset"], row["setting"]) for row in differing()}
    assert set(differences_listed()) <= there


def test_every_setting_of_a_paper_preset_has_a_source():
    """What a preset sets itself, but for paths and what depends on the machine."""
    sourced = {(row["kind"], row["preset"], row["setting"]) for row in SOURCES}
    own = {"output", "workers", "batch_size"}
    for kind in RECIPES:
        for preset in ("ssv2", "k400", "ucf101", "hmdb51"):
            text = (ROOT / "examples" / "presets" / kind / f"{preset}.yaml").read_text()
            for setting in yaml.safe_load(text).keys() - own:
                assert (kind, preset, setting) in sourced, (kind, preset, setting)


@pytest.mark.parametrize(("kind", "preset"), [(kind, preset) for kind in RECIPES for preset in ("ssv2", "ucf101")])
def test_a_wrong_setting_would_be_found(kind, preset, monkeypatch):
    wrong, right = load_preset(RECIPES[kind], preset).plain() | {"weight_decay": 0.3}, value_of
    monkeypatch.setattr(
        sys.modules[__name__], "value_of", lambda *key: wrong[key[2]] if key[:2] == (kind, preset) else right(*key)
    )
    assert (kind, preset, "weight_decay") in {(row["kind"], row["preset"], row["setting"]) for row in differing()}


def test_every_part_of_the_supplement_has_its_place():
    page = (ROOT / "examples" / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", page.split("## Where each part of the supplement is", 1)[1], re.MULTILINE)
    text = "\n".join(rows)
    ranges = {each for a, b in re.findall(r"Figures (\d+) to (\d+)", text) for each in range(int(a), int(b) + 1)} | {
        int(each) for each in re.findall(r"Figure (\d+)", text)
    }
    assert ranges == set(range(1, 15))
    assert {int(each) for each in re.findall(r"Table (\d+)", text)} == set(range(1, 8))
    assert {int(each) for each in re.findall(r"Algorithm (\d+)", text)} == {1, 2}
    assert {row[0] for row in rows[1:]} == set("ABCDEFGHIJK")


def short(number):
    """1.5e-4 as people write it."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


@pytest.mark.parametrize("kind", RECIPES)
def test_the_tables_of_presets_are_the_presets(kind):
    presets = {name: load_preset(RECIPES[kind], name) for name in ("ssv2", "k400", "ucf101", "hmdb51")}
    page, first, cells = {
        "pretrain": (
            "training.md",
            "| masked;",
            lambda r: (
                f"{r.mask_ratio:.0%}; {short(r.base_lr)}; {r.effective_batch}",
                f"{r.epochs:g}, {r.warmup_epochs:g}",
                f"{r.stride}, {'yes' if r.flip else 'no'}",
            ),
        ),
        "finetune": (
            "finetuning.md",
            "| base learning rate",
            lambda r: (
                f"{short(r.base_lr)}, {short(r.min_base_lr)}",
                f"{r.epochs:g}, {r.warmup_epochs:g}, {r.effective_batch}",
                f"{r.layer_decay:g}, {r.drop_path:g}, {r.head_dropout:g}",
                f"{'yes' if r.flip else 'no'}; {r.repeats}",
                f"{r.test_clips} x {r.test_crops}",
            ),
        ),
    }[kind]
    lines = (ROOT / "examples" / "docs" / page).read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    wanted = list(zip(*(cells(recipe) for recipe in presets.values()), strict=True))
    found = [tuple(line.strip("| ").split(" | ")[1:]) for line in lines[start : start + len(wanted)]]
    assert found == wanted
