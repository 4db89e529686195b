"""The schedule of a run: batches, steps and learning rates, from a recipe and the numbers of videos and devices.

Steps and learning rates are those of the official code (`cosine_scheduler`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.recipe import Recipe


def steps_of_epoch(clips: int, effective_batch: int) -> float:
    """An epoch counts as many steps as it has whole batches, since the official code drops the rest; below one batch,
    the part of a step that it is."""
    return clips // effective_batch or clips / effective_batch


@dataclass(frozen=True)
class Schedule:
    """Batches, steps and learning rates of a run.

    Attributes:
        clips: number of videos of the data set.
        effective_batch: videos of one optimiser step.
        accumulation: forward passes of one optimiser step on one device.
        steps: optimiser steps of the run.
        warmup_steps: steps over which the learning rate rises, at most half of `steps`.
        shortened: whether the recipe asked for a longer warm-up.
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
        """The schedule of a recipe for a data set of `clips` videos on this number of devices.

        See `steps_of_epoch`. Videos that are left over in an epoch are the first of the next batch, so a run of 800
        epochs goes through the videos a little less than 800 times.
        """
        accumulation = recipe.accumulation(devices)
        effective = recipe.batch_size * devices * accumulation
        per_epoch = steps_of_epoch(clips, effective)

        def in_steps(epochs: float) -> int:
            return math.floor(epochs * per_epoch)

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
        """Learning rate of step 0, 1, ...: from 0 evenly up to `lr` in the last step of the warm-up, then half a cosine
        that would reach `min_lr` in the step after the last."""
        if step < self.warmup_steps:
            return self.lr * step / max(1, self.warmup_steps - 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def describe_schedule(recipe: Recipe, schedule: Schedule, devices: int) -> dict[str, str]:
    """The lines of the resolved recipe that both training scripts print, by name."""
    videos = schedule.clips
    warmup = f"{schedule.warmup_steps} of warm-up" + (" (shortened to half the run)" if schedule.shortened else "")
    steps = f"{schedule.steps}, {warmup}, {schedule.steps * schedule.effective_batch / max(videos, 1):.1f} epochs"
    if 0 < videos < schedule.effective_batch:
        steps += f"; a batch is larger than the data set of {videos}"
    if not videos:
        steps = f"{recipe.epochs:g} epochs, {recipe.warmup_epochs:g} of warm-up; steps follow from the data"
    clip = f"clip {recipe.clip_grad:g}" if recipe.clip_grad else "no clipping"
    return {
        "batch": f"{recipe.batch_size} videos x {devices} devices x {schedule.accumulation} accumulated = "
        f"{schedule.effective_batch}, {recipe.repeats} clips of each",
        "steps": steps,
        "learning rate": f"{recipe.base_lr:g} x {schedule.effective_batch} / 256 = {schedule.lr:.3g}, cosine to "
        f"{schedule.min_lr:.3g}",
        "optimizer": f"AdamW, betas {recipe.betas}, weight decay {recipe.weight_decay:g}, {clip}",
        "reading": f"{recipe.readers} processes for each device"
        + (", its cores" if recipe.readers < recipe.workers else ""),
        "output": str(recipe.output),
    }
