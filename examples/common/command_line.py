"""Command lines: the --checkpoint file gives sizes and settings, and options override them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import tyro

import common.threads  # noqa: F401 - before torch, which the scripts import after this
from common.checkpoint_header import stated_recipe, stated_sizes
from common.settings import SIZES, EncoderSettings

Settings = TypeVar("Settings", bound=EncoderSettings)


def checkpoint_of(arguments: list[str]) -> str:
    """The value of --checkpoint on a command line, or an empty string."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint", default="")
    found: str = first.parse_known_args(arguments)[0].checkpoint
    return found


def of_checkpoint(settings: Settings, arguments: list[str], taken: Sequence[str]) -> Settings:
    """The settings, with the sizes that the --checkpoint file or folder states.

    Args:
        settings: the settings to start from.
        arguments: the command line.
        taken: names of other settings to take from the recipe in the checkpoint, if the checkpoint has one.
    """
    checkpoint = checkpoint_of(arguments)
    sizes, recipe = stated_sizes(checkpoint), stated_recipe(checkpoint)
    found = {name: sizes[name] for name in SIZES if name in sizes}
    return replace(settings, **found, **{name: recipe[name] for name in taken if name in recipe})


def num_processes() -> int:
    """The number of processes of this launch, before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints, before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def parse_settings(start: Settings, arguments: list[str], description: str | None) -> Settings:
    """The settings of a script without presets: `start`, then sizes and sampling of --checkpoint, then options."""
    default = of_checkpoint(start, arguments, ("sampling", "stride"))
    settings: Settings = tyro.cli(type(start), args=arguments, default=default, description=description)
    settings.check_sizes()
    return settings
