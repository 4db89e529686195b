"""The training loop that pre-training and fine-tuning share, and what belongs to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, gather_object
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from adamae_sampler.models import AdaMAE, VideoClassifier
from common.datasets import ClipSource, ClipStream, collate_clips
from common.metrics import DeviceMetrics, RunLog
from common.recipe import EncoderSettings, Recipe, Schedule
from common.state import save_state

_SHOWN = {
    "loss": "loss",
    "rec": "reconstruction",
    "samp": "sampling",
    "entropy": "entropy",
    "cover": "coverage",
    "data": "data_time",
}  # fmt: skip - metrics on the progress bar


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's handle on devices and processes; precision is 'auto', 'fp32' or 'bf16'."""
    # Said outright, since torchrun without a GPU would otherwise start processes that do not know of each other.
    on_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if good else "fp32"
    return Accelerator(
        cpu=on_cpu,
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
    )


class Normalise:
    """uint8 pixels -> floating point with ImageNet's mean and deviation, on the device, which holds the constants."""

    def __init__(self, device: torch.device) -> None:
        self.mean, self.std = (
            255 * torch.tensor(each, device=device).view(3, 1, 1, 1)
            for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def __call__(self, video: Tensor) -> Tensor:
        """[..., 3, T, H, W] uint8 -> fp32 of the same shape."""
        return (video - self.mean) / self.std


def load_clips(recipe: Recipe, schedule: Schedule, source: ClipSource, first_step: int) -> DataLoader:
    """Batches of the clips from `first_step` to the end, in order of their position."""
    batch = schedule.effective_batch
    stream = ClipStream(source, first_step * batch, schedule.steps * batch, recipe.seed)
    return DataLoader(
        stream,
        batch_size=recipe.batch_size,
        num_workers=recipe.workers,
        collate_fn=collate_clips,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that starting to read spends none of the masks' randomness
    )


@dataclass
class Loop:
    """Optimiser steps with accumulated gradients, metrics and checkpoints.

    Attributes:
        recipe: the settings.
        schedule: what follows from them.
        accelerator: devices and processes.
        model: prepared.
        optimizer: a fused AdamW, prepared; a group's learning rate is scaled by its `lr_scale`, if it has one.
        metrics: what the forward pass adds to.
        forward: from a batch and its number in the run on this process to the loss.
        after_step: called with the number of steps done, after each.
        extra: what the script wants in a checkpoint.
    """

    recipe: Recipe
    schedule: Schedule
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    metrics: DeviceMetrics
    forward: Callable[[dict[str, Any], int], Tensor]
    after_step: Callable[[int, RunLog], None] = lambda _step, _log: None
    extra: Callable[[], Mapping[str, Any]] = dict

    def run(self, batches: DataLoader, first_step: int) -> list[str]:
        """Trains from `first_step` to the end; returns messages about videos that could not be read."""
        recipe, schedule, accelerator = self.recipe, self.schedule, self.accelerator
        is_main = accelerator.is_main_process
        left_out: dict[str, None] = {}  # an ordered set of messages
        progress = tqdm(total=schedule.steps, initial=first_step, disable=not is_main, unit="step", file=sys.stdout)
        with RunLog(recipe.output, first_step, enabled=is_main) as log, progress:
            self.model.train()
            feed = iter(batches)
            data_time, logged_at, logged_step = 0.0, time.perf_counter(), first_step
            for step in range(first_step, schedule.steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = schedule.lr_at(step) * group.get("lr_scale", 1.0)
                for part in range(schedule.accumulation):
                    waited = time.perf_counter()
                    batch = next(feed)
                    data_time += time.perf_counter() - waited
                    left_out |= dict.fromkeys(batch["left_out"])
                    is_last = part == schedule.accumulation - 1
                    with nullcontext() if is_last else accelerator.no_sync(self.model):  # gradients travel once a step
                        loss = self.forward(batch, step * schedule.accumulation + part)
                        accelerator.backward(loss / schedule.accumulation)
                grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad or torch.inf)
                # Where this is 1 the fused kernel leaves the weights alone: a bad step is skipped without a wait.
                self.optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.metrics.add_update(grad_norm, accelerator)
                progress.update()

                done = step + 1
                if done % recipe.log_every == 0 or done == schedule.steps:
                    values = self.metrics.read(accelerator)
                    now, steps = time.perf_counter(), done - logged_step
                    values |= {
                        "lr": schedule.lr_at(step),
                        "epoch": done * schedule.effective_batch / schedule.clips,
                        "step_time": (now - logged_at) / steps,
                        "data_time": data_time / steps,
                        "clips_per_second": steps * schedule.effective_batch * recipe.repeats / (now - logged_at),
                    }
                    log.write(done, values)
                    progress.set_postfix(_summary(values))
                    _warn_about_nonfinite(done, values)
                    data_time, logged_at, logged_step = 0.0, now, done
                between = time.perf_counter()
                self.after_step(done, log)
                if done % recipe.save_every == 0 or done == schedule.steps:
                    path = recipe.output / "state.pt"
                    save_state(path, accelerator, self.model, self.optimizer, recipe, schedule, done, self.extra())
                logged_at += time.perf_counter() - between  # evaluations and checkpoints are no training
        return list(dict.fromkeys(gather_object(list(left_out))))


def _summary(values: Mapping[str, float | None]) -> dict[str, str]:
    """The metrics for the progress bar."""
    return {short: f"{value:.3g}" for short, name in _SHOWN.items() if (value := values.get(name)) is not None}


def _warn_about_nonfinite(step: int, values: Mapping[str, float | None]) -> None:
    """Prints what was not finite since the last line of metrics."""
    names = [name for name in values if name.startswith("nonfinite_") or name == "skipped_steps"]
    if any(values[name] for name in names):
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {values[name]:g}" for name in names))


def describe_training(recipe: Recipe, schedule: Schedule, accelerator: Accelerator, videos: int) -> dict[str, str]:
    """The lines of the resolved recipe that every training has."""
    warmup = f"{schedule.warmup_steps} of warm-up" + (" (shortened to half the run)" if schedule.shortened else "")
    steps = f"{schedule.steps}, {warmup}, {schedule.steps * schedule.effective_batch / max(videos, 1):.1f} epochs"
    if not videos:
        steps = f"{recipe.epochs:g} epochs, {recipe.warmup_epochs:g} of warm-up; steps follow from the data"
    clip = f"clip {recipe.clip_grad:g}" if recipe.clip_grad else "no clipping"
    return {
        "batch": f"{recipe.batch_size} videos x {accelerator.num_processes} devices x {schedule.accumulation} "
        f"accumulated = {schedule.effective_batch}, {recipe.repeats} clips of each",
        "steps": steps,
        "learning rate": f"{recipe.base_lr:g} x {schedule.effective_batch} / 256 = {schedule.lr:.3g}, cosine to "
        f"{schedule.min_lr:.3g}",
        "optimizer": f"AdamW, betas {recipe.betas}, weight decay {recipe.weight_decay:g}, {clip}",
        "device": f"{accelerator.device}, {describe_precision(accelerator)}",
        "output": str(recipe.output),
    }


def describe_clips(settings: EncoderSettings) -> str:
    """Which frames a clip takes, and its size."""
    frames = f"stride {settings.stride}" if settings.sampling == "dense" else "one of each"
    return (
        f"{settings.num_frames} frames, {settings.sampling} ({frames}), {settings.img_size[0]}x{settings.img_size[1]}"
    )


def describe_encoder(name: str, model: AdaMAE | VideoClassifier) -> str:
    """Name and size of a model."""
    size, blocks = model.size, model.encoder.blocks
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    width = model.encoder.pos_embed.shape[-1]
    return f"{name}, {millions:.3g}M parameters, width {width}, {len(blocks)} blocks, grid {size.grid}"


def describe_precision(accelerator: Accelerator) -> str:
    """'fp32' or 'bf16'."""
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def format_lines(lines: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())


def check_output(output: Path, *new: str) -> None:
    """Raises ValueError if the output folder is a file, or has one of the files that are about to be written."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder.")
    if there := [name for name in new if (output / name).exists()]:
        raise ValueError(f"--output {output} has {', '.join(there)} already; name another folder, or delete it.")


def report_left_out(report: Path, left_out: list[str], what: str) -> None:
    """Prints and writes which videos could not be used and what became of them; removes an earlier file."""
    report.unlink(missing_ok=True)
    if not left_out:
        return
    print(f"{len(left_out)} videos {what} (also in {report}):")
    print("\n".join(f"  {message}" for message in left_out))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(left_out) + "\n", encoding="utf-8")
