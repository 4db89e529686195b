"""Pre-trains a video masked autoencoder with adaptive, random, tube or frame masking.

    python examples/pretrain.py                                       a small model on the bundled video
    python examples/pretrain.py --data sprites --masking random       generated clips, another masking
    python examples/pretrain.py --preset k400 --data train.csv        the paper's recipe (k400, ssv2, ucf101, hmdb51)
    accelerate launch examples/pretrain.py --preset ssv2 --data DIR   on all GPUs of a machine

Writes metrics.jsonl, TensorBoard files, state.pt (for --resume), model.safetensors and overview.png.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_weight_decay
from torch import Tensor

from adamae_sampler import AdaMAELoss
from adamae_sampler.models import AdaMAE
from adamae_sampler.visualize import overview
from common.checkpoints import save_weights
from common.cli import Run, parse_arguments
from common.datasets import ClipSource, ClipStream
from common.engine import (
    Loop,
    Normalise,
    check_output,
    describe_clips,
    describe_encoder,
    describe_training,
    format_lines,
    load_clips,
    make_accelerator,
    report_left_out,
)
from common.metrics import PretrainMetrics
from common.pretrain_recipe import PretrainRecipe
from common.recipe import Schedule
from common.sources import pretrain_source
from common.state import load_state, restore_random_state, set_aside
from common.video import VideoError


class Job(NamedTuple):
    """What a recipe and the command line come to."""

    accelerator: Accelerator
    source: ClipSource
    schedule: Schedule
    model: AdaMAE
    state: dict[str, Any] | None
    continues_in_place: bool  # a resumed run that stays in its folder


def build(recipe: PretrainRecipe, run: Run) -> Job:
    """Finds the data and makes the model; raises ValueError or FileNotFoundError for what cannot be run."""
    check_output(recipe.output)
    accelerator = make_accelerator(recipe.precision)
    if not recipe.data and not run.dry_run:
        raise ValueError(f"preset {run.preset} needs --data: a folder of videos, or a list file.")
    source = pretrain_source(recipe)
    schedule = Schedule.of(recipe, len(source), accelerator.num_processes)
    set_seed(recipe.seed)  # the same weights on every process
    if recipe.model not in timm.list_models("pretrain_adamae*"):
        raise ValueError(f"no model {recipe.model!r}; there are {', '.join(timm.list_models('pretrain_adamae*'))}.")
    model: AdaMAE = timm.create_model(recipe.model, **recipe.model_args())
    model.set_grad_checkpointing(recipe.checkpoint_activations)
    state = load_state(run.resume, recipe, schedule, accelerator.num_processes) if run.resume else None
    if accelerator.is_main_process:
        print(describe(recipe, run.preset, schedule, model, accelerator, len(source)))
        if state is not None:
            print(f"{'resumes':>13}  {run.resume} from step {state['step']}")
    in_place = run.resume is not None and run.resume.resolve().parent == recipe.output.resolve()
    return Job(accelerator, source, schedule, model, state, in_place)


def train(recipe: PretrainRecipe, job: Job) -> None:
    """Trains, and writes weights and pictures at the end."""
    accelerator, source, schedule, model, state, _ = job
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
    if accelerator.is_main_process and not job.continues_in_place and (earlier := set_aside(recipe.output)):
        print(f"{'set aside':>13}  the earlier run is now {earlier}")

    normalise = Normalise(accelerator.device)
    metrics = PretrainMetrics(accelerator.unwrap_model(model).sampler.num_tokens, accelerator.device)

    def forward(batch: dict[str, Any], _: int) -> Tensor:
        prediction, sample = model(normalise(batch["video"]))
        out = criterion(prediction, batch["video"], sample)
        metrics.add_forward(out, sample)
        return out.loss

    loop = Loop(recipe, schedule, accelerator, model, optimizer, metrics, forward)
    left_out = loop.run(batches, first_step)
    if accelerator.is_main_process:
        finish(recipe, accelerator.unwrap_model(model), criterion, source, normalise)
        report_left_out(recipe.output / "left_out.txt", left_out, "could not be read and were replaced by others")
    accelerator.end_training()


def describe(
    recipe: PretrainRecipe, preset: str, schedule: Schedule, model: AdaMAE, accelerator: Accelerator, clips: int
) -> str:
    """The resolved recipe, for people."""
    visible, tokens = model.sampler.num_visible, model.sampler.num_tokens
    lines = {
        "preset": preset,
        "data": f"{recipe.data or 'none given'}, {clips} videos",
        "clips": f"{describe_clips(recipe)}, {'flip' if recipe.flip else 'no flip'}",
        "model": describe_encoder(recipe.model, model),
        "masking": f"{recipe.masking}, {visible} of {tokens} tokens visible ({1 - visible / tokens:.1%} masked)",
        "target": f"{'normalised' if recipe.normalize_target else 'raw'} pixels, {recipe.loss}, sampling weight "
        f"{recipe.sampling_weight:g}",
    }
    return format_lines(lines | describe_training(recipe, schedule, accelerator, clips))


@torch.no_grad()
def finish(
    recipe: PretrainRecipe, model: AdaMAE, criterion: AdaMAELoss, source: ClipSource, normalise: Normalise
) -> None:
    """Writes the weights, and a picture of the first clip that can be read."""
    save_weights(model, recipe.output / "model.safetensors", recipe)
    video = ClipStream(source, 0, 1, recipe.seed)[0]["video"][:1].to(normalise.mean.device)
    generator = torch.Generator(video.device).manual_seed(recipe.seed)
    prediction, sample = model.eval()(normalise(video), generator=generator)
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


def main(arguments: list[str]) -> None:
    """Runs the command line; a setting that cannot be is one line, without a traceback."""
    try:
        recipe, run = parse_arguments(PretrainRecipe, arguments, "demo", __doc__)
        job = build(recipe, run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if run.dry_run:
        return
    try:
        train(recipe, job)
    except VideoError as error:  # nothing left to train on; a worker puts its traceback before the message
        sys.exit(f"error: {str(error).rpartition('VideoError: ')[2].strip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
