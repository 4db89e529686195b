"""The pre-training recipe: every setting of a run, its presets, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

PRESETS = Path(__file__).parent.parent / "presets"


@dataclass(frozen=True)
class Recipe:
    """Settings of a pre-training run. A preset gives the defaults, the command line overrides them."""

    data: str = ""
    """Folder of videos, list file (`path label` or `path start frames label`), or 'sprites'."""
    output: Path = Path("runs/pretrain")
    """Folder for metrics, checkpoints and pictures."""

    model: str = "pretrain_adamae_vit_base_patch16_224"
    """Model of timm's registry."""
    masking: Literal["adaptive", "random", "tube", "frame"] = "adaptive"
    """How visible tokens are chosen."""
    mask_ratio: float = 0.95
    """Share of tokens that is masked."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width of a clip in pixels."""
    num_frames: int = 16
    """Frames of a clip."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    tubelet_size: int = 2
    """Frames of a patch."""
    embed_dim: int | None = None
    """Width of the encoder; the model's own if None, as for the next five."""
    depth: int | None = None
    """Blocks of the encoder."""
    num_heads: int | None = None
    """Attention heads of the encoder."""
    decoder_embed_dim: int | None = None
    """Width of the decoder."""
    decoder_depth: int | None = None
    """Blocks of the decoder."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, to save memory."""

    normalize_target: bool = True
    """Predict pixels normalised per patch and channel (the paper's), or raw ones."""
    loss: Literal["mse", "l1"] = "mse"
    """Reconstruction error."""
    sampling_weight: float = 1e-4
    """Weight of the sampling loss."""

    stride: int = 4
    """Distance of two frames of a clip in frames of the video."""
    flip: bool = False
    """Mirror half of the clips."""

    epochs: float = 800
    """Passes over the data."""
    warmup_epochs: float = 40
    """Passes over which the learning rate rises."""
    steps: int | None = None
    """Optimiser steps, in place of epochs."""
    warmup_steps: int | None = None
    """Steps of warm-up, in place of warmup_epochs."""
    batch_size: int = 32
    """Clips of one forward pass on one device."""
    effective_batch: int | None = None
    """Clips of one optimiser step over all devices; gradients are accumulated to reach it. batch_size x devices if
    None."""
    base_lr: float = 1.5e-4
    """Learning rate for an effective batch of 256; the one used is proportional."""
    min_base_lr: float = 1e-5
    """What the cosine falls to, for an effective batch of 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    weight_decay: float = 0.05
    """Weight decay; biases, norms, position embeddings and the mask token have none."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; 'auto' is bf16 on devices made for it, fp32 elsewhere (CPUs)."""
    workers: int = 4
    """Processes that read clips; 0 reads them in the training process."""
    seed: int = 0
    """Of weights, data order, augmentation and masks."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    save_every: int = 1000
    """Steps between two checkpoints; one is written at the end in any case."""

    def __post_init__(self) -> None:
        at_least = {"num_frames": 1, "patch_size": 1, "tubelet_size": 1, "stride": 1, "batch_size": 1, "log_every": 1}
        at_least |= {"save_every": 1, "workers": 0, "clip_grad": 0, "base_lr": 0, "weight_decay": 0, "epochs": 0}
        at_least |= {"warmup_epochs": 0, "sampling_weight": 0, "min_base_lr": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}, expected {least} or more.")
        for name, least in {"steps": 1, "effective_batch": 1, "warmup_steps": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected {least} or more.")

    def model_args(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model`, which leaves out those that are None."""
        names = (
            "masking mask_ratio img_size num_frames patch_size tubelet_size embed_dim depth num_heads "
            "decoder_embed_dim decoder_depth decoder_num_heads"
        )
        return {name: getattr(self, name) for name in names.split()}

    def accumulation(self, devices: int) -> int:
        """Forward passes of one optimiser step on each of so many devices."""
        clips = self.batch_size * devices
        effective = self.effective_batch or clips
        if effective % clips:
            raise ValueError(
                f"effective_batch={effective} is not a multiple of batch_size x devices = {self.batch_size} x "
                f"{devices}. "
                + (
                    f"Choose a batch_size that divides {effective // devices}."
                    if effective % devices == 0
                    else f"Choose an effective_batch that {devices} divides."
                )
            )
        return effective // clips

    def plain(self) -> dict[str, Any]:
        """The settings as numbers, strings and lists, for files."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**plain, "output": str(self.output)}


@dataclass(frozen=True)
class Schedule:
    """What follows from a recipe, the number of clips and the number of devices.

    Attributes:
        clips: videos of the data set.
        effective_batch: clips of one optimiser step.
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
        """The schedule of a recipe for a data set of so many clips on so many devices."""
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


def load_preset(name: str) -> Recipe:
    """The recipe of presets/<name>.yaml.

    Raises:
        ValueError: there is no such preset, or it sets something that is not in a recipe.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no preset {name!r}; there are {', '.join(known)}.")
    values: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    strangers = values.keys() - {each.name for each in fields(Recipe)}
    if strangers:
        raise ValueError(f"preset {name} sets {', '.join(sorted(strangers))}, which a recipe does not have.")
    values["data"] = str(PRESETS.parent / values["data"]) if "data" in values else ""
    return recipe_from(values)


def recipe_from(plain: dict[str, Any]) -> Recipe:
    """The recipe whose settings a file has as numbers, strings and lists, the inverse of `Recipe.plain`."""
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in plain.items()}
    values["output"] = Path(values["output"])
    return Recipe(**values)
