"""Recipes: the settings that every training run has, and their presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from common.settings import EncoderSettings

PRESETS = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class Recipe(EncoderSettings):
    """Settings of a training run. A preset gives the defaults, the command line overrides them."""

    kind: ClassVar[str]  # the folder of its presets
    data_settings: ClassVar[tuple[str, ...]] = ()  # those that name data
    shortcuts: ClassVar[dict[str, dict[str, Any]]] = {}  # flags, and the values of other settings that each stands for

    output: Path
    """Folder for metrics, checkpoints and results."""

    repeats: int = 1
    """Clips of each video in a batch, augmented apart (repeated augmentation); the video is decoded once."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, to save memory."""
    compile: Literal["blocks", "whole"] | None = None
    """torch.compile of the transformers' blocks one by one, or of the model as a whole."""
    flip: bool = False
    """Mirror half of the clips."""

    epochs: float
    """Passes over the data."""
    warmup_epochs: float
    """Passes over which the learning rate rises."""
    steps: int | None = None
    """Optimiser steps, in place of epochs."""
    warmup_steps: int | None = None
    """Steps of warm-up, in place of warmup_epochs."""
    batch_size: int
    """Videos of one forward pass on one device; each gives `repeats` clips."""
    effective_batch: int | None = None
    """Videos of one optimiser step over all devices; gradients are accumulated to reach it. batch_size x devices if
    None."""
    base_lr: float
    """Learning rate for an effective batch of 256; the one used is proportional."""
    min_base_lr: float
    """Learning rate at the end of the cosine, for an effective batch of 256."""
    betas: tuple[float, float]
    """Betas of AdamW."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms, position embeddings and the mask token have none."""
    clip_grad: float
    """Largest norm of the gradient; 0 for no clipping."""

    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints; one is written at the end in any case, and on SIGTERM (then the run ends) and
    SIGUSR1."""
    save_minutes: float = 30
    """Minutes between two checkpoints, where steps are slow."""
    keep_checkpoints: int = 2
    """The latest checkpoints that are kept, besides the best one."""
    stop_after_nonfinite: int = 20
    """A step whose gradient is not finite is skipped; so many in a row end the run."""
    max_broken: float = 0.1
    """Largest share of the videos that may be broken; they are replaced by others, more end the run."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Service that metrics are sent to, besides metrics.jsonl and TensorBoard's files."""
    profile: bool = False
    """Write a trace of a few steps to output/profile, for TensorBoard or Perfetto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(
            repeats=1, batch_size=1, log_every=1, save_every=1, clip_grad=0, base_lr=0, weight_decay=0, epochs=0,
            warmup_epochs=0, min_base_lr=0, steps=1, effective_batch=1, warmup_steps=0, save_minutes=0,
            keep_checkpoints=1, stop_after_nonfinite=1, max_broken=0,
        )  # fmt: skip

    def check_shortcuts(self) -> None:
        """Raises ValueError if a shortcut is on and a setting that it stands for has another value.

        `recipe_from` and the command line call this. Within `__post_init__` tyro would put a frame around the message.
        """
        for shortcut, meant in self.shortcuts.items():
            for name, value in meant.items():
                if getattr(self, shortcut) and getattr(self, name) != value:
                    raise ValueError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} contradicts --{shortcut}, which stands for "
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
                    else f"Choose an effective_batch that {devices} divides; a resumed run, which keeps its own, "
                    "needs another number of devices."
                )
            )
        return effective // videos


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_preset(kind: type[AnyRecipe], name: str) -> AnyRecipe:
    """The recipe of presets/<kind>/<name>.yaml.

    Raises:
        ValueError: there is no such preset, or it sets something that is not in a recipe.
    """
    folder = PRESETS / kind.kind
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no preset {name!r}; there are {', '.join(known)}.")
    values: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    strangers = values.keys() - {each.name for each in fields(kind)}
    if strangers:
        raise ValueError(f"preset {name} sets {', '.join(sorted(strangers))}, which a recipe does not have.")
    for setting in kind.data_settings:  # bundled data is named from the folder of the examples
        if (PRESETS.parent / values.get(setting, "")).exists() and values.get(setting):
            values[setting] = str(PRESETS.parent / values[setting])
    return recipe_from(kind, values)


def recipe_from(kind: type[AnyRecipe], plain: dict[str, Any]) -> AnyRecipe:
    """The recipe whose settings a file has as numbers, strings and lists, the inverse of `Recipe.plain`.

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
