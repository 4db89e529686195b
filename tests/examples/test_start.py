"""What the scripts answer at once: --help, mistakes on the command line and --dry-run do not wait for torch."""

import os
import subprocess
import sys
from typing import get_args

import finetune
import pretrain
import pytest
import timm
from forked import EXAMPLES
from scripts import refused, run_here

from adamae_sampler import losses, networks
from adamae_sampler.models import PRESETS
from adamae_sampler.sampler import maskings
from common import choices
from common.models import AUTOENCODERS, CLASSIFIERS
from evaluation.settings import ExtractionSettings, PictureSettings, ProbeSettings
from training.finetune_recipe import FinetuneRecipe
from training.pretrain_recipe import PretrainRecipe

SCRIPTS = ["pretrain", "finetune", "linear_probe", "extract_features", "visualize_masks", "prepare_data"]
WITHOUT_TORCH = """
import runpy, sys
script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, script.rpartition("/")[0])
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as ended:
    print("ended with", ended.code or 0)
print("imported", *sorted({"torch", "timm", "accelerate", "adamae_sampler"} & sys.modules.keys()))
"""


def started(script, *arguments):
    """What a script prints in a process of its own, and which of the slow packages it imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    return run.stdout, run.stdout.rpartition("imported")[2].split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_typo_do_not_import_torch(script):
    printed, imported = started(script, "--help")
    assert "ended with 0" in printed
    assert imported == []
    printed, imported = started(script, "--hlep")
    assert "ended with 2" in printed
    assert imported == []


def test_a_dry_run_does_not_import_torch(tmp_path):
    clips = EXAMPLES / "clips"
    printed, imported = started("pretrain", "--preset", "k400", "--data", clips, "--dry-run")
    assert "learning rate  0.00015 x 2048 / 256 = 0.0012" in printed
    assert imported == []
    (tmp_path / "list.csv").write_text(f"{clips / 'bigbuckbunny.mp4'} 0\n{clips / 'bigbuckbunny.mp4'} 1\n")
    data = ["--train", tmp_path / "list.csv", "--val", tmp_path / "list.csv"]
    printed, imported = started("finetune", "--preset", "k400", *data, "--dry-run")
    assert "classes  2" in printed
    assert imported == []


def test_threads_sleep_unless_the_user_says_otherwise():
    for said, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": said} if said else {}
        code = (
            "import os, sys; import pretrain; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES, env=environment, check=True
        )
        assert run.stdout.strip() == expected


def test_choices_are_those_of_the_package():
    assert choices.Masking == maskings.Masking
    assert choices.Network == networks.Network
    assert choices.Estimator == losses.Estimator
    assert dict(PRESETS["fast"]) == choices.FAST
    with_network = [name for name in get_args(choices.Masking) if "score_network" in maskings.settings_of(name)]
    assert list(choices.SCORED_MASKINGS) == with_network
    assert set(get_args(choices.Autoencoder)) == set(timm.list_models(AUTOENCODERS))
    assert set(get_args(choices.Classifier)) == set(timm.list_models(CLASSIFIERS))


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (PretrainRecipe, ["data", "output"]),
        (FinetuneRecipe, ["checkpoint", "train", "val", "output"]),
        (ProbeSettings, ["checkpoint", "train", "val", "output"]),
        (ExtractionSettings, ["checkpoint", "data", "output"]),
        (PictureSettings, ["checkpoint", "video", "output"]),
    ],
)
def test_settings_begin_with_what_a_run_needs_and_end_with_sizes(settings, first):
    names = list(settings.__dataclass_fields__)
    assert names[: len(first)] == first
    sizes = names[names.index("model") :]
    assert sizes[:4] == ["model", "img_size", "num_frames", "patch_size"]
    assert all(name.endswith(("size", "num_frames", "embed_dim", "depth", "num_heads")) for name in sizes[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--img-size", "60", "64"], "patch_size=8 does not divide img_size=(60, 64); change either"),
        (["--num-frames", "7"], "tubelet_size=2 does not divide num_frames=7; change either"),
        (["--embed-dim", "38"], "num_heads=4 does not divide embed_dim=38; change either"),
        (["--mask-ratio", "1.0"], "mask_ratio=1.0, expected a share strictly between 0 and 1"),
    ],
)
def test_a_dry_run_refuses_sizes_that_do_not_fit(arguments, message):
    assert message in refused(pretrain.main, *arguments, "--dry-run")


def test_readers_are_at_most_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    recipe = PretrainRecipe(workers=6)
    assert recipe.readers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert recipe.readers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert recipe.readers == 1
    assert PretrainRecipe(workers=0).readers == 0


def test_data_that_cannot_be_learned_from_is_named(tmp_path):
    video = EXAMPLES / "clips" / "bigbuckbunny.mp4"
    folder = refused(finetune.main, "--train", video.parent, "--val", video.parent, "--dry-run")
    assert "clips gives no labels. Give a list with a line 'path label' for each video" in folder
    (tmp_path / "list.csv").write_text(f"{video} 0\n{video} 1\n")
    same = run_here(finetune.main, "--train", tmp_path / "list.csv", "--val", tmp_path / "list.csv", "--dry-run")
    assert "classes  2: 2 of them to train on, 2 of them to test on; WARNING: --train and --val are the same" in same
    assert "classes  not known without data" in run_here(finetune.main, "--dry-run")
