"""Recipes: the settings that every training run has, their presets, and the learning rate that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from common.sampling import Sampling

PRESETS = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How large encoder and clips are, and which frames of a video a clip takes."""

    model: str
    """Model of timm's registry."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width of a clip in pixels."""
    num_frames: int = 16
    """Frames of a clip."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    tubelet_size: int = 2
    """Frames of a patch."""
    embed_dim: int | None = None
    """Width of the encoder; the model's own if None, as for the next two."""
    depth: int | None = None
    """Blocks of the encoder."""
    num_heads: int | None = None
    """Attention heads of the encoder."""

    sampling: Sampling = "dense"
    """Frames of a clip: 'dense', at the stride from one place (Kinetics), or 'segments', one of each of num_frames
    equal parts of the video, whatever the stride (Something-Something)."""
    stride: int = 4
    """Distance of two frames of a clip in frames of the video."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; 'auto' is bf16 on devices made for it, fp32 elsewhere (CPUs). fp16, on GPUs, scales the losses."""
    workers: int = 4
    """Processes that read clips; 0 reads them in the main process."""
    seed: int = 0
    """Of every random choice: weights, order of the data, augmentation, masks."""

    def __post_init__(self) -> None:
        self.check_least(num_frames=1, patch_size=1, tubelet_size=1, stride=1, workers=0)

    def check_least(self, **least: float) -> None:
        """Raises ValueError for a setting below its least value; None is none."""
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value}, expected {bound} or more.")

    def check_most(self, **most: float) -> None:
        """Raises ValueError for a setting above its largest value; None is none."""
        for name, bound in most.items():
            value = getattr(self, name)
            if value is not None and not value <= bound:
                raise ValueError(f"{name}={value}, expected {bound} or less.")

    def sizes(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` that say how large clips and encoder are; None is the model's."""
        names = ("img_size", "num_frames", "patch_size", "tubelet_size", "embed_dim", "depth", "num_heads")
        return {name: getattr(self, name) for name in names}

    def plain(self) -> dict[str, Any]:
        """The settings as numbers, strings and lists, for files."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


@dataclass(frozen=True, kw_only=True)
class Recipe(EncoderSettings):
    """Settings of a training run. A preset gives the defaults, the command line overrides them."""

    kind: ClassVar[str]  # the folder of its presets
    data_settings: ClassVar[tuple[str, ...]] = ()  # those that name data

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
    """What the cosine falls to, for an effective batch of 256."""
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
    """Where metrics are sent besides metrics.jsonl and TensorBoard's files."""
    profile: bool = False
    """Write a trace of a few steps to output/profile, for TensorBoard or Perfetto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(
            repeats=1, batch_size=1, log_every=1, save_every=1, clip_grad=0, base_lr=0, weight_decay=0, epochs=0,
            warmup_epochs=0, min_base_lr=0, steps=1, effective_batch=1, warmup_steps=0, save_minutes=0,
            keep_checkpoints=1, stop_after_nonfinite=1, max_broken=0,
        )  # fmt: skip

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


@dataclass(frozen=True)
class Schedule:
    """What follows from a recipe, the number of videos and the number of devices.

    Attributes:
        clips: videos of the data set.
        effective_batch: videos of one optimiser step.
        accumulation: forward passes of one optimiser step on one device.
        steps: optimiser steps of the run.
        warmup_steps: steps over which the learning rate rises, at most half of them.
        shortened: whether the recipe asked for more warm-up than that.
        lr: highest learning rate, base_lr * effective_batch / 256.
        min_lr: last learning rate.
    """

    clips: int
    effective_batch: int
    accumulation: int
    steps: int
    warmup_steps: int
    shortened: bool
    lr: float
    min_lr: float

    @classmethod
    def of(cls, recipe: Recipe, clips: int, devices: int) -> Schedule:
        """The schedule of a recipe for a data set of so many videos on so many devices."""
        accumulation = recipe.accumulation(devices)
        effective = recipe.batch_size * devices * accumulation

        def in_steps(epochs: float) -> int:
            return math.floor(epochs * clips / effective)

        steps = recipe.steps if recipe.steps is not None else max(1, in_steps(recipe.epochs))
        warmup = recipe.warmup_steps if recipe.warmup_steps is not None else in_steps(recipe.warmup_epochs)
        scale = effective / 256
        return cls(
            clips=clips,
            effective_batch=effective,
            accumulation=accumulation,
            steps=steps,
            warmup_steps=min(warmup, steps // 2),
            shortened=warmup > steps // 2,
            lr=recipe.base_lr * scale,
            min_lr=recipe.min_base_lr * scale,
        )

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: a linear rise to `lr`, then half a cosine down to `min_lr`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


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
    """The recipe whose settings a file has as numbers, strings and lists, the inverse of `Recipe.plain`."""
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in plain.items()}
    values["output"] = Path(values["output"])
    return kind(**values)
