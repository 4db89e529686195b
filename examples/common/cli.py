"""The command lines of the training scripts: a preset or a saved run gives the settings, options override them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import tyro

from common.recipe import AnyRecipe, load_preset
from common.state import recipe_of_state


@dataclass(frozen=True)
class Run:
    """What a run needs besides its recipe."""

    preset: str
    """Recipe to start from, a file of examples/presets."""
    resume: Path | None = None
    """A state.pt to go on from, with the settings and in the folder of its run."""
    dry_run: bool = False
    """Print the resolved recipe and exit."""


@dataclass(frozen=True)
class _Arguments(Generic[AnyRecipe]):
    recipe: tyro.conf.OmitArgPrefixes[AnyRecipe]
    run: tyro.conf.OmitArgPrefixes[Run]


def parse_arguments(
    kind: type[AnyRecipe],
    arguments: list[str],
    preset: str,
    description: str | None,
    adjust: Callable[[AnyRecipe, argparse.Namespace], AnyRecipe] = lambda recipe, _: recipe,
) -> tuple[AnyRecipe, Run]:
    """The recipe of --preset, or of the run that --resume names, with what the command line overrides.

    Args:
        kind: the class of the recipe.
        arguments: the command line.
        preset: name of the preset where none is given.
        description: for --help.
        adjust: changes the recipe before the command line does, given --preset, --resume and --checkpoint.

    Raises:
        ValueError, FileNotFoundError: no such preset or state, or settings that contradict each other.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=preset)
    first.add_argument("--resume", type=Path)
    first.add_argument("--checkpoint", default="")
    known = first.parse_known_args(arguments)[0]
    if known.resume is None:
        start = adjust(load_preset(kind, known.preset), known)
    else:
        start = recipe_of_state(kind, known.resume)
    default = _Arguments(start, Run(known.preset))
    found = tyro.cli(_Arguments[kind], args=arguments, default=default, description=description)  # type: ignore[valid-type]
    for given, wins in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        value = getattr(found.recipe, wins)
        if getattr(found.recipe, given) != getattr(start, given) and value is not None:
            option = "--" + wins.replace("_", "-")
            raise ValueError(f"{given} has no effect while {wins} is {value}; add {option} None to go by epochs.")
    return found.recipe, found.run
