"""Pre-trains a video masked autoencoder with adaptive, random, tube or frame masking.

    python examples/pretrain.py                                       a small model on the bundled video
    python examples/pretrain.py --data sprites --masking random       generated clips, another masking
    python examples/pretrain.py --preset k400 --data train.csv        the paper's recipe (k400, ssv2, ucf101, hmdb51)
    accelerate launch examples/pretrain.py --preset ssv2 --data DIR   on all GPUs of a machine

Writes metrics.jsonl, TensorBoard files, state.pt (for --resume), model.safetensors and overview.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    gather_object,
    set_seed,
)
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from adamae_sampler import AdaMAELoss
from adamae_sampler.models import AdaMAE
from adamae_sampler.visualize import overview
from common.datasets import ClipSource, ClipStream, collate_clips, make_source
from common.metrics import DeviceMetrics, RunLog
from common.recipe import Recipe, Schedule, load_preset
from common.state import load_state, recipe_of_state, restore_random_state, save_state, set_aside
from common.video import VideoError


@dataclass(frozen=True)
class Run:
    """What a run needs besides its recipe."""

    preset: str = "demo"
    """Recipe to start from: demo, k400, ssv2, ucf101 or hmdb51 (examples/presets)."""
    resume: Path | None = None
    """A state.pt to go on from, with the settings and in the folder of its run."""
    dry_run: bool = False
    """Print the resolved recipe and exit."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    run: tyro.conf.OmitArgPrefixes[Run]


class Job(NamedTuple):
    """What a recipe and the command line come to."""

    accelerator: Accelerator
    source: ClipSource
    schedule: Schedule
    model: AdaMAE
    state: dict[str, Any] | None
    continues_in_place: bool  # a resumed run that stays in its folder


def build(recipe: Recipe, run: Run) -> Job:
    """Finds the data and makes the model; raises ValueError or FileNotFoundError for what cannot be run."""
    if recipe.output.exists() and not recipe.output.is_dir():
        raise ValueError(f"--output {recipe.output} is a file; name a folder.")
    # Said outright, since torchrun without a GPU would otherwise start processes that do not know of each other.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=choose_precision(recipe),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
    )
    if not recipe.data and not run.dry_run:
        raise ValueError(f"preset {run.preset} needs --data: a folder of videos, or a list file.")
    source = make_source(
        recipe.data,
        num_frames=recipe.num_frames,
        stride=recipe.stride,
        img_size=recipe.img_size,
        patch_size=recipe.patch_size,
        tubelet_size=recipe.tubelet_size,
        flip=recipe.flip,
        seed=recipe.seed,
    )
    schedule = Schedule.of(recipe, len(source), accelerator.num_processes)
    set_seed(recipe.seed)  # the same weights on every process
    if recipe.model not in timm.list_models("pretrain_adamae*"):
        raise ValueError(f"no model {recipe.model!r}; there are {', '.join(timm.list_models('pretrain_adamae*'))}.")
    model: AdaMAE = timm.create_model(recipe.model, **recipe.model_args())
    model.set_grad_checkpointing(recipe.checkpoint_activations)
    state = load_state(run.resume, recipe, schedule, accelerator.num_processes) if run.resume else None
    if accelerator.is_main_process:
        print(describe(recipe, schedule, model, accelerator, len(source)))
        if state is not None:
            print(f"{'resumes':>13}  {run.resume} from step {state['step']}")
    in_place = run.resume is not None and run.resume.resolve().parent == recipe.output.resolve()
    return Job(accelerator, source, schedule, model, state, in_place)


def train(recipe: Recipe, job: Job) -> None:
    """The training loop, and what is written at its end."""
    accelerator, source, schedule, model, state, _ = job
    device, is_main = accelerator.device, accelerator.is_main_process
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=recipe.betas, fused=True)
    first_step = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    criterion = AdaMAELoss(
        recipe.sampling_weight,
        kind=recipe.loss,
        normalize=recipe.normalize_target,
        patch_size=recipe.patch_size,
        tubelet_size=recipe.tubelet_size,
    )
    batches = load_clips(recipe, schedule, source, first_step)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    set_seed(recipe.seed, device_specific=True)  # from here on, other masks on every process
    if state is not None:
        restore_random_state(state, accelerator)

    num_tokens = accelerator.unwrap_model(model).sampler.num_tokens
    if is_main and not job.continues_in_place and (earlier := set_aside(recipe.output)):
        print(f"{'set aside':>13}  the earlier run is now {earlier}")
    normalise = Normalise(device)
    metrics = DeviceMetrics(num_tokens, device)
    left_out: dict[str, None] = {}  # an ordered set of messages
    progress = tqdm(total=schedule.steps, initial=first_step, disable=not is_main, unit="step", file=sys.stdout)
    with RunLog(recipe.output, first_step, enabled=is_main) as log, progress:
        model.train()
        feed = iter(batches)
        data_time, logged_at, logged_step = 0.0, time.perf_counter(), first_step
        for step in range(first_step, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            for part in range(schedule.accumulation):
                waited = time.perf_counter()
                batch = next(feed)
                data_time += time.perf_counter() - waited
                left_out |= dict.fromkeys(batch["left_out"])
                is_last = part == schedule.accumulation - 1
                with nullcontext() if is_last else accelerator.no_sync(model):  # gradients travel once a step
                    prediction, sample = model(normalise(batch["video"]))
                    out = criterion(prediction, batch["video"], sample)
                    accelerator.backward(out.loss / schedule.accumulation)
                metrics.add_forward(out, sample)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad or torch.inf)
            # Where this is 1 the fused kernel leaves the weights alone: a bad step is skipped without a wait.
            optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
            metrics.add_update(grad_norm)
            progress.update()

            done = step + 1
            if done % recipe.log_every == 0 or done == schedule.steps:
                values = metrics.read(accelerator)
                now, steps = time.perf_counter(), done - logged_step
                values |= {
                    "lr": schedule.lr_at(step),
                    "epoch": done * schedule.effective_batch / len(source),
                    "step_time": (now - logged_at) / steps,
                    "data_time": data_time / steps,
                    "clips_per_second": steps * schedule.effective_batch / (now - logged_at),
                }
                data_time, logged_at, logged_step = 0.0, now, done
                log.write(done, values)
                progress.set_postfix(summary(values))
                warn_about_nonfinite(done, values)
            if done % recipe.save_every == 0 or done == schedule.steps:
                save_state(recipe.output / "state.pt", accelerator, model, optimizer, recipe, schedule, done)

    left_out = dict.fromkeys(gather_object(list(left_out)))
    if is_main:
        finish(recipe, accelerator.unwrap_model(model), criterion, source, normalise)
        report_left_out(recipe.output, list(left_out))
    accelerator.end_training()


def choose_precision(recipe: Recipe) -> str:
    """Accelerate's name for the recipe's precision."""
    if recipe.precision != "auto":
        return {"fp32": "no", "bf16": "bf16"}[recipe.precision]
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


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


class Normalise:
    """uint8 pixels -> floating point with ImageNet's mean and deviation, on the device, which holds the constants."""

    def __init__(self, device: torch.device) -> None:
        self.mean, self.std = (
            255 * torch.tensor(each, device=device).view(1, 3, 1, 1, 1)
            for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    def __call__(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] uint8 -> fp32 of the same shape."""
        return (video - self.mean) / self.std


def describe(recipe: Recipe, schedule: Schedule, model: AdaMAE, accelerator: Accelerator, clips: int) -> str:
    """The resolved recipe, for people."""
    visible, tokens = model.sampler.num_visible, model.sampler.num_tokens
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    warmup = f"{schedule.warmup_steps} of warm-up" + (" (shortened to half the run)" if schedule.shortened else "")
    steps = f"{schedule.steps}, {warmup}, {schedule.steps * schedule.effective_batch / max(clips, 1):.1f} epochs"
    if not clips:
        steps = f"{recipe.epochs:g} epochs, {recipe.warmup_epochs:g} of warm-up; steps follow from --data"
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    lines = {
        "data": f"{recipe.data or 'none given'}, {clips} videos, {recipe.num_frames} frames at stride {recipe.stride}, "
        f"{recipe.img_size[0]}x{recipe.img_size[1]}, {'flip' if recipe.flip else 'no flip'}",
        "model": f"{recipe.model}, {millions:.1f}M parameters, grid {model.size.grid}",
        "masking": f"{recipe.masking}, {visible} of {tokens} tokens visible ({1 - visible / tokens:.1%} masked)",
        "target": f"{'normalised' if recipe.normalize_target else 'raw'} pixels, {recipe.loss}, sampling weight "
        f"{recipe.sampling_weight:g}",
        "batch": f"{recipe.batch_size} clips x {accelerator.num_processes} devices x {schedule.accumulation} "
        f"accumulated = {schedule.effective_batch}",
        "steps": steps,
        "learning rate": f"{recipe.base_lr:g} x {schedule.effective_batch} / 256 = {schedule.lr:.3g}, cosine to "
        f"{schedule.min_lr:.3g}",
        "optimizer": f"AdamW, betas {recipe.betas}, weight decay {recipe.weight_decay:g}, clip {recipe.clip_grad:g}",
        "device": f"{accelerator.device}, {precision}",
        "output": str(recipe.output),
    }
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())


def summary(values: dict[str, float | None]) -> dict[str, str]:
    """The metrics for the progress bar."""
    shown = {
        "rec": "reconstruction",
        "samp": "sampling",
        "entropy": "entropy",
        "cover": "coverage",
        "data": "data_time",
    }
    return {short: f"{value:.3g}" for short, name in shown.items() if (value := values[name]) is not None}


def warn_about_nonfinite(step: int, values: dict[str, float | None]) -> None:
    """Prints what was not finite since the last line of metrics."""
    names = ("nonfinite_scores", "nonfinite_reconstruction", "nonfinite_sampling", "skipped_steps")
    if any(values[name] for name in names):
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {values[name]:g}" for name in names))


@torch.no_grad()
def finish(recipe: Recipe, model: AdaMAE, criterion: AdaMAELoss, source: ClipSource, normalise: Normalise) -> None:
    """Writes the weights, and a picture of the first clip that can be read."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(weights, recipe.output / "model.safetensors")
    clip = ClipStream(source, 0, 1, recipe.seed)[0]
    device = normalise.mean.device
    video = clip["video"][None].to(device)
    prediction, sample = model.eval()(normalise(video), generator=torch.Generator(device).manual_seed(recipe.seed))
    out = criterion(prediction, video, sample)
    figure = overview(
        video,
        prediction,
        sample,
        out.token_error,
        normalize=recipe.normalize_target,
        patch_size=recipe.patch_size,
        tubelet_size=recipe.tubelet_size,
    )
    figure.savefig(recipe.output / "overview.png", dpi=110)
    print(f"wrote {', '.join(str(recipe.output / name) for name in ('model.safetensors', 'state.pt', 'overview.png'))}")


def report_left_out(output: Path, left_out: list[str]) -> None:
    """Prints and writes which videos could not be read."""
    if not left_out:
        return
    print(f"{len(left_out)} videos could not be read and were replaced by others (also in {output / 'left_out.txt'}):")
    print("\n".join(f"  {message}" for message in left_out))
    (output / "left_out.txt").write_text("\n".join(left_out) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str]) -> tuple[Recipe, Run]:
    """The recipe of --preset, or of the run that --resume names, with what the command line overrides."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=Run.preset)
    first.add_argument("--resume", type=Path)
    known = first.parse_known_args(arguments)[0]
    start = load_preset(known.preset) if known.resume is None else recipe_of_state(known.resume)
    found = tyro.cli(Arguments, args=arguments, default=Arguments(start, Run(known.preset)), description=__doc__)
    for given, wins in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        value = getattr(found.recipe, wins)
        if getattr(found.recipe, given) != getattr(start, given) and value is not None:
            option = "--" + wins.replace("_", "-")
            raise ValueError(f"{given} has no effect while {wins} is {value}; add {option} None to go by epochs.")
    return found.recipe, found.run


if __name__ == "__main__":
    try:
        settings = parse_arguments(sys.argv[1:])
        job = build(*settings)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")  # a setting, not a defect: no traceback
    if not settings[1].dry_run:
        try:
            train(settings[0], job)
        except VideoError as error:  # nothing left to train on; a worker puts its traceback before the message
            sys.exit(f"error: {str(error).rpartition('VideoError: ')[2].strip()}")
