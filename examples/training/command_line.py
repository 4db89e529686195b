"""Command lines of the training scripts: a preset or a saved run gives the settings, and options override them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import tyro

from common.command_line import is_first_process, of_checkpoint
from training.recipe import AnyRecipe, load_preset


@dataclass(frozen=True)
class Run:
    """Options of a run besides its recipe."""

    preset: str
    """Name of the preset to start from, a file in examples/presets."""
    resume: Path | None = None
    """Checkpoint to resume from; its run gives the settings and the output folder. 'auto' takes the newest whole
    checkpoint in --output, and starts a new run if there is none."""
    dry_run: bool = False
    """Print the resolved recipe and exit. The model is made only if there is a checkpoint to read."""

    @property
    def origin(self) -> str:
        """The source of the settings that no option gives."""
        return f"preset {self.preset}" if self.resume is None else f"those of {self.resume}"


@dataclass(frozen=True)
class _Arguments(Generic[AnyRecipe]):
    run: tyro.conf.OmitArgPrefixes[Run]
    recipe: tyro.conf.OmitArgPrefixes[AnyRecipe]


def parse_arguments(
    kind: type[AnyRecipe], arguments: list[str], preset: str, description: str | None, taken: Sequence[str] = ()
) -> tuple[AnyRecipe, Run]:
    """The recipe of the run to resume, or else of --preset with the sizes of --checkpoint; options override it.

    Args:
        kind: the class of the recipe.
        arguments: the command line.
        preset: name of the default preset.
        description: text of --help.
        taken: names of other settings to take from the recipe in --checkpoint.

    Raises:
        ValueError: the preset or checkpoint cannot be used, or settings contradict each other.
        FileNotFoundError: there is no such checkpoint.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=preset)
    first.add_argument("--resume", type=Path)
    first.add_argument("--output", type=Path)
    for shortcut in kind.shortcuts:
        first.add_argument(f"--{shortcut}", action="store_true")
    known = first.parse_known_args(arguments)[0]
    preset_recipe = load_preset(kind, known.preset)
    resume = known.resume
    if resume == Path("auto"):
        resume = _newest(known.output or preset_recipe.output, kind)
    if resume:
        from training.resume import recipe_of_state  # it imports torch

        start = recipe_of_state(kind, resume)
    else:
        start = of_checkpoint(preset_recipe, arguments, taken)
    for shortcut, meant in kind.shortcuts.items():
        if getattr(known, shortcut):  # a default only, so that `check_shortcuts` sees an option that contradicts it
            start = replace(start, **{shortcut: True, **meant})
    default = _Arguments(Run(known.preset), start)
    found = tyro.cli(_Arguments[kind], args=arguments, default=default, description=description)  # type: ignore[valid-type]
    found.recipe.check_shortcuts()
    found.recipe.check_sizes()
    for given, wins in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        value = getattr(found.recipe, wins)
        if getattr(found.recipe, given) != getattr(start, given) and value is not None:
            option = "--" + wins.replace("_", "-")
            raise ValueError(f"{given} has no effect while {wins} is {value}; add {option} None to go by epochs.")
    return found.recipe, replace(found.run, resume=resume)


def _newest(output: Path, kind: type[AnyRecipe]) -> Path | None:
    """The checkpoint of --resume auto. Prints which files were passed over, and whether a new run begins."""
    from training.checkpoints import CHECKPOINTS, Checkpoints  # it imports torch

    newest, passed_over = Checkpoints(output / CHECKPOINTS).newest(kind.kind)
    speaks = is_first_process()
    for message in passed_over if speaks else ():
        print(f"passed over: {message}")
    if newest is None and speaks:
        print(f"--resume auto: no checkpoint in {output / CHECKPOINTS}, a new run begins")
    return newest
