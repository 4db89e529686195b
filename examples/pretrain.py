"""Pre-trains a video masked autoencoder with adaptive, random, tube or frame masking.

    python examples/pretrain.py                                       a small model on the bundled video
    python examples/pretrain.py --data sprites --masking random       generated clips, another masking
    python examples/pretrain.py --preset k400 --data train.csv        the paper's recipe (k400, ssv2, ucf101, hmdb51)
    accelerate launch examples/pretrain.py --preset ssv2 --data DIR   on all GPUs of a machine
    accelerate launch --config_file examples/launch/fsdp2.yaml ...    with FSDP2; many machines, DeepSpeed: see there

Writes recipe.yaml, metrics.jsonl, TensorBoard files, checkpoints/ (for --resume), model.safetensors and overview.png.
--resume auto goes on from the newest checkpoint in --output, or begins where there is none.
"""

from __future__ import annotations

import sys
from dataclasses import fields
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
from common.costs import forward_flops
from common.datasets import ClipSource, ClipStream
from common.devices import make_accelerator
from common.endings import run_to_the_end
from common.engine import Loop, Resumed
from common.graphs import check_graph
from common.metrics import PretrainMetrics
from common.pretrain_recipe import SAMPLER_SETTINGS, PretrainRecipe
from common.recipe import Schedule
from common.report import check_output, describe_clips, describe_encoder, describe_training, format_lines
from common.sources import pretrain_source
from common.whole import whole_weights


class Job(NamedTuple):
    """What a recipe and the command line come to."""

    accelerator: Accelerator
    source: ClipSource
    schedule: Schedule
    model: AdaMAE
    resumed: Resumed | None


def build(recipe: PretrainRecipe, run: Run) -> Job:
    """Finds the data and makes the model; raises ValueError or FileNotFoundError for what cannot be run."""
    check_output(recipe.output)
    accelerator = make_accelerator(recipe.precision, recipe.compile == "whole", recipe.tracker)
    if recipe.graph:
        check_graph(recipe, accelerator)
    if not recipe.data and not run.dry_run:
        raise ValueError(f"preset {run.preset} needs --data: a folder of videos, or a list file.")
    source = pretrain_source(recipe)
    schedule = Schedule.of(recipe, len(source), accelerator.num_processes)
    set_seed(recipe.seed)  # the same weights on every process
    if recipe.model not in timm.list_models("pretrain_adamae*"):
        raise ValueError(f"no model {recipe.model!r}; there are {', '.join(timm.list_models('pretrain_adamae*'))}.")
    model: AdaMAE = timm.create_model(recipe.model, **recipe.model_args())
    model.set_grad_checkpointing(recipe.checkpoint_activations)
    resumed = Resumed.load(run.resume, recipe, schedule, source)
    if accelerator.is_main_process:
        print(describe(recipe, run.origin, schedule, model, accelerator, len(source)))
        if resumed:
            print(resumed.describe(accelerator, recipe))
    return Job(accelerator, source, schedule, model, resumed)


def train(recipe: PretrainRecipe, job: Job) -> None:
    """Trains, and writes weights and pictures at the end."""
    accelerator, source, schedule, model, resumed = job
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=recipe.betas, fused=True)
    criterion = AdaMAELoss(**recipe.loss_args())
    flops = forward_flops(model, 1, 3, recipe.num_frames, *recipe.img_size)
    better = ("reconstruction", -1)
    loop = Loop.begin(recipe, schedule, accelerator, model, optimizer, source, resumed, better)
    metrics = PretrainMetrics(model.sampler.num_tokens, accelerator.device)

    def forward(batch: dict[str, Any], _: int) -> Tensor:
        prediction, sample = loop.model(batch["video"])
        out = criterion(prediction, batch["video"], sample)
        metrics.add_forward(out, sample)
        return out.loss

    loop.run(forward, metrics, flops, graph=recipe.graph)
    weights = whole_weights(accelerator, loop.model)
    if accelerator.is_main_process:
        finish(recipe, weights, criterion, source, accelerator.device)
        loop.quarantine.report()
    accelerator.end_training()


def describe(
    recipe: PretrainRecipe, origin: str, schedule: Schedule, model: AdaMAE, accelerator: Accelerator, clips: int
) -> str:
    """The resolved recipe, for people."""
    visible, tokens = model.sampler.num_visible, model.sampler.num_tokens
    lines = {
        "settings": origin,
        "data": f"{recipe.data or 'none given'}, {clips} videos",
        "clips": f"{describe_clips(recipe)}, {'flip' if recipe.flip else 'no flip'}",
        "model": describe_encoder(recipe.model, model),
        "masking": f"{recipe.masking}, {visible} of {tokens} tokens visible ({1 - visible / tokens:.1%} masked)"
        + describe_options(recipe),
        "target": f"{'normalised' if recipe.normalize_target else 'raw'} pixels, {recipe.loss}, sampling weight "
        f"{recipe.sampling_weight:g}",
    }
    lines |= describe_training(recipe, schedule, model, accelerator, clips)
    lines["device"] += ", CUDA graph" if recipe.graph else ""
    return format_lines(lines)


def describe_options(recipe: PretrainRecipe) -> str:
    """What differs from the paper's method."""
    names = (*SAMPLER_SETTINGS, "num_masks", "decode_ratio", "fused_head", "estimator")
    usual = {each.name: each.default for each in fields(recipe)}
    changed = {name: value for name in names if (value := getattr(recipe, name)) != usual[name]}
    return "".join(f", {name}={value}" for name, value in changed.items())


@torch.no_grad()
def finish(
    recipe: PretrainRecipe, weights: dict[str, Tensor], criterion: AdaMAELoss, source: ClipSource, device: torch.device
) -> None:
    """Writes the weights, and a picture of the first clip that can be read."""
    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)  # free of what wraps it
    model.load_state_dict(weights)
    save_weights(model, recipe.output / "model.safetensors", recipe)
    video = ClipStream(source, 0, 1, recipe.seed)[0]["video"][:1].to(device)
    model.sampler.num_masks = criterion.num_masks = 1  # one for the picture
    generator = torch.Generator(video.device).manual_seed(recipe.seed)
    prediction, sample = model.eval()(video, generator=generator)
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
    print(f"wrote {', '.join(str(recipe.output / name) for name in ('model.safetensors', 'overview.png'))}")


def main(arguments: list[str]) -> None:
    """Runs the command line; a setting that cannot be is one line, without a traceback."""
    try:
        recipe, run = parse_arguments(PretrainRecipe, arguments, "demo", __doc__)
        job = build(recipe, run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not run.dry_run:
        run_to_the_end(lambda: train(recipe, job))


if __name__ == "__main__":
    main(sys.argv[1:])
