"""Recipes: the settings that all training runs share, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from common.settings import EncoderSettings

PRESETS = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class Recipe(EncoderSettings):
    """Settings of a training run. A preset gives the defaults, and the command line overrides them.

    Subclasses give fields without a default their default and their help.
    """

    kind: ClassVar[str]  # the folder of the presets
    data_settings: ClassVar[tuple[str, ...]] = ()  # settings that name data
    shortcuts: ClassVar[dict[str, dict[str, Any]]] = {}  # flag -> the settings that it stands for

    output: Path

    repeats: int = 1
    """Clips of each video in a batch, each with its own augmentation; the video is decoded once."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: Literal["blocks", "whole"] | None = None
    """Use torch.compile on each transformer block ('blocks') or on the whole model ('whole')."""
    flip: bool = False
    """Mirror clips left to right, with probability 1/2."""

    epochs: float
    warmup_epochs: float
    steps: int | None = None
    """Optimiser steps of the run; overrides epochs."""
    warmup_steps: int | None = None
    """Optimiser steps of warm-up; overrides warmup_epochs."""
    batch_size: int
    effective_batch: int | None = None
    """Videos of one optimiser step over all devices; gradients are accumulated to reach this number. None: batch_size x
    devices."""
    base_lr: float
    min_base_lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.05
    """Weight decay of AdamW; biases, norms and the mask token have none."""
    clip_grad: float

    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints. The last step, SIGUSR1 and SIGTERM write one too; SIGTERM then ends the run."""
    save_minutes: float = 30
    """Longest time between two checkpoints, in minutes."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep, besides the best one."""
    stop_after_nonfinite: int = 20
    """End the run after so many skipped steps in a row. A step with a nonfinite gradient is skipped."""
    max_broken: float = 0.1
    """Largest share of the videos that may be broken; a larger share ends the run. Other videos replace broken ones."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Service that gets the metrics too, besides metrics.jsonl and TensorBoard files."""
    profile: bool = False
    """Write a trace of steps 4 to 6 to the folder profile in --output, for TensorBoard or Perfetto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(
            repeats=1, batch_size=1, log_every=1, save_every=1, clip_grad=0, base_lr=0, weight_decay=0, epochs=0,
            warmup_epochs=0, min_base_lr=0, steps=1, effective_batch=1, warmup_steps=0, save_minutes=0,
            keep_checkpoints=1, stop_after_nonfinite=1, max_broken=0,
        )  # fmt: skip

    def check_shortcuts(self) -> None:
        """Raises ValueError if a shortcut is on and a setting that it stands for has another value.

        `recipe_from` and the command line call this, since tyro draws a frame around messages of `__post_init__`.
        """
        for shortcut, meant in self.shortcuts.items():
            for name, value in meant.items():
                if getattr(self, shortcut) and getattr(self, name) != value:
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} contradicts --{shortcut}, which sets "
                        f"{name}={value}; leave one of them out."
                    )

    def accumulation(self, devices: int) -> int:
        """Forward passes of one optimiser step on each of so many devices."""
        videos = self.batch_size * devices
        effective = self.effective_batch or videos
        if effective % videos:
            raise ValueError(
                f"effective_batch={effective} is not a multiple of batch_size x devices = {self.batch_size} x "
                f"{devices}. "
                + (
                    f"Choose a batch_size that divides {effective // devices}."
                    if effective % devices == 0
                    else f"Choose an effective_batch that {devices} divides. A resumed run keeps its effective_batch: "
                    "change the number of devices."
                )
            )
        return effective // videos


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_preset(kind: type[AnyRecipe], name: str) -> AnyRecipe:
    """The recipe of presets/<kind>/<name>.yaml.

    Raises:
        ValueError: there is no such preset, or it has a setting that the recipe lacks.
    """
    folder = PRESETS / kind.kind
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no preset {name!r}; there are {', '.join(known)}.")
    values: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    strangers = values.keys() - {each.name for each in fields(kind)}
    if strangers:
        raise ValueError(f"preset {name} sets {', '.join(sorted(strangers))}, which the recipe does not have.")
    for setting in kind.data_settings:  # paths of bundled data start at the examples folder
        if (PRESETS.parent / values.get(setting, "")).exists() and values.get(setting):
            values[setting] = str(PRESETS.parent / values[setting])
    return recipe_from(kind, values)


def recipe_from(kind: type[AnyRecipe], plain: dict[str, Any]) -> AnyRecipe:
    """The recipe with the settings of a file (numbers, strings and lists); the inverse of `Recipe.plain`.

    Raises:
        ValueError: settings that are out of range, or that contradict each other.
    """
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in plain.items()}
    for shortcut, meant in kind.shortcuts.items():
        values = {**meant, **values} if values.get(shortcut) else values
    values["output"] = Path(values["output"])
    recipe = kind(**values)
    recipe.check_shortcuts()
    return recipe
