"""Pre-trains a video masked autoencoder with adaptive masking, or with another of `--masking`.

    python examples/pretrain.py                                       a small model on the bundled video
    python examples/pretrain.py --data sprites --masking random       generated clips, another masking
    python examples/pretrain.py --preset k400 --data train.csv        the paper's recipe (k400, ssv2, ucf101, hmdb51)
    accelerate launch examples/pretrain.py --preset ssv2 --data DIR   on all GPUs of a machine
    accelerate launch --config_file examples/launch/fsdp2.yaml ...    with FSDP2; see examples/launch for more

Training writes recipe.yaml, metrics.jsonl, TensorBoard files, checkpoints/, model.safetensors and overview.png.
--resume auto goes on from the newest checkpoint in --output. Without a checkpoint there, a new run begins.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from adamae_sampler import AdaMAELoss, HardTokenSampler
from adamae_sampler.models import AdaMAE
from adamae_sampler.visualize import overview
from common.devices import make_accelerator
from common.models import AUTOENCODERS, save_weights
from common.report import check_output, describe_clips, describe_encoder, format_lines
from training.command_line import Run, parse_arguments
from training.cuda_graph import check_graph
from training.full_state import full_weights
from training.interrupts import run_to_the_end
from training.job import Job
from training.loop import TrainingLoop
from training.metrics import PretrainMetrics
from training.pretrain_recipe import SAMPLER_SETTINGS, PretrainRecipe
from training.throughput import forward_flops
from video_data.clips import ClipSource, ClipStream
from video_data.datasets import VideoDataset
from video_data.transforms import PretrainTransform

PretrainJob = Job[PretrainRecipe, AdaMAE]


def clip_source(recipe: PretrainRecipe) -> ClipSource:
    """The clips of --data; none if --data is empty. Raises ValueError or FileNotFoundError."""
    transform = PretrainTransform(recipe.img_size, recipe.flip)
    return VideoDataset.find(recipe.data, recipe).clips(recipe, transform, recipe.repeats)


def build(recipe: PretrainRecipe, run: Run) -> PretrainJob:
    """Finds the data and makes the model; raises ValueError or FileNotFoundError if the run is not possible."""
    check_output(recipe.output)
    accelerator = make_accelerator(recipe.precision, recipe.compile == "whole", recipe.tracker)
    if recipe.graph:
        check_graph(recipe, accelerator)
    if not recipe.data and not run.dry_run:
        raise ValueError(f"preset {run.preset} needs --data: a folder of videos, or a list file.")
    source = clip_source(recipe)
    job: PretrainJob = Job.build(recipe, accelerator, source, run.resume, AUTOENCODERS, recipe.model_args())
    if accelerator.is_main_process:
        print(describe(job, run.origin))
    return job


def parameter_groups(recipe: PretrainRecipe, model: AdaMAE) -> list[dict[str, Any]]:
    """The optimizer's groups: biases, norms and the mask token have no weight decay."""
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())


def train(job: PretrainJob) -> None:
    """Trains, and writes weights and a picture at the end."""
    recipe, accelerator, model = job.recipe, job.accelerator, job.model
    groups = parameter_groups(recipe, model)
    optimizer = torch.optim.AdamW(groups, lr=job.schedule.lr, betas=recipe.betas, fused=True)
    criterion = AdaMAELoss(**recipe.loss_args())
    flops = forward_flops(model, 1, 3, recipe.num_frames, *recipe.img_size)
    loop = TrainingLoop(job, optimizer, better=("reconstruction", -1))
    if isinstance(model.sampler, HardTokenSampler):  # its ramp lasts the whole run, also on another number of devices
        done = job.resumed.state["step"] if job.resumed else 0
        calls = job.schedule.accumulation  # of each step
        model.sampler.share.set(done * calls, job.schedule.steps * calls)
    metrics = PretrainMetrics(model.sampler.num_tokens, accelerator.device)

    # The path of a clip: VideoClips.clips -> ClipStream -> clip_loader (video_data/clips.py) -> TrainingLoop.run ->
    # _update (training/loop.py) -> here. _update then calls the backward pass.
    def forward(batch: dict[str, Any], _: int) -> Tensor:
        video = batch["video"]  # [B, 3, T, H, W] uint8; the model and the loss normalise it
        prediction, sample = loop.model(video)
        out = criterion(prediction, video, sample)
        metrics.add_forward(out, sample)
        return out.loss

    loop.run(forward, metrics, flops, graph=recipe.graph)
    weights = full_weights(accelerator, loop.model)
    if accelerator.is_main_process:
        finish(job, weights, criterion)
        loop.broken_videos.report()
    accelerator.end_training()


def describe(job: PretrainJob, origin: str) -> str:
    """The resolved recipe as text."""
    recipe, model = job.recipe, job.model
    visible, tokens = model.sampler.num_visible, model.sampler.num_tokens
    lines = {
        "settings": origin,
        "data": f"{recipe.data or 'none given'}, {len(job.source)} videos",
        "clips": f"{describe_clips(recipe)}, {'flip' if recipe.flip else 'no flip'}",
        "model": describe_encoder(recipe.model, model),
        "masking": f"{recipe.masking}, {visible} of {tokens} tokens visible ({1 - visible / tokens:.1%} masked)"
        + describe_options(recipe),
        "target": f"{'normalised' if recipe.normalize_target else 'raw'} pixels, {recipe.loss}, sampling weight "
        f"{recipe.sampling_weight:g}",
    }
    lines |= job.describe()
    lines["device"] += ", CUDA graph" if recipe.graph else ""
    return format_lines(lines)


def describe_options(recipe: PretrainRecipe) -> str:
    """The settings that differ from the paper's method."""
    names = (*SAMPLER_SETTINGS, "num_masks", "decode_ratio", "target_ratio", "fused_head", "estimator")
    usual = {each.name: each.default for each in fields(recipe)}
    changed = {name: value for name in names if (value := getattr(recipe, name)) != usual[name]}
    return "".join(f", {name}={value}" for name, value in changed.items())


@torch.no_grad()
def finish(job: PretrainJob, weights: dict[str, Tensor], criterion: AdaMAELoss) -> None:
    """Writes the weights, and a picture of the first readable clip."""
    recipe, device = job.recipe, job.accelerator.device
    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)  # without DDP or shards around it
    model.load_state_dict(weights)
    save_weights(model, recipe.output / "model.safetensors", recipe)
    video = ClipStream(job.source, 0, 1, recipe.seed)[0]["video"][:1].to(device)
    model.sampler.num_masks = criterion.num_masks = 1  # a picture shows one mask
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
    """Runs the command line. An invalid setting prints one line without a traceback."""
    try:
        recipe, run = parse_arguments(PretrainRecipe, arguments, "demo", __doc__)
        job = build(recipe, run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not run.dry_run:
        run_to_the_end(lambda: train(job))


if __name__ == "__main__":
    main(sys.argv[1:])
