"""Pre-training: from a recipe to weights and a picture. `pretrain.py` is its command line."""

from __future__ import annotations

from pathlib import Path
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
from common.report import format_lines
from training.cuda_graph import check_graph
from training.full_state import full_weights
from training.interrupts import run_to_the_end
from training.job import Job
from training.loop import TrainingLoop
from training.metrics import PretrainMetrics
from training.pretrain_recipe import PretrainRecipe
from training.throughput import forward_flops
from video_data.clips import ClipStream
from video_data.datasets import VideoDataset
from video_data.sources import clip_source
from video_data.transforms import PretrainTransform

PretrainJob = Job[PretrainRecipe, AdaMAE]


def build(recipe: PretrainRecipe, data: VideoDataset, resume: Path | None) -> PretrainJob:
    """Makes the model and reads the checkpoint; raises ValueError or FileNotFoundError if the run is not possible."""
    accelerator = make_accelerator(recipe.precision, recipe.compile == "whole", recipe.tracker)
    if recipe.graph:
        check_graph(recipe, accelerator)
    source = clip_source(data, recipe, PretrainTransform(recipe.img_size, recipe.flip), recipe.repeats)
    job: PretrainJob = Job.build(recipe, accelerator, source, resume, AUTOENCODERS, recipe.model_args())
    if accelerator.is_main_process:
        lines = job.describe()
        visible, tokens = job.model.sampler.num_visible, job.model.sampler.num_tokens
        lines["model"] += f", {visible} of {tokens} tokens visible"
        lines["device"] += ", CUDA graph" if recipe.graph else ""
        print(format_lines(lines))
    return job


def parameter_groups(recipe: PretrainRecipe, model: AdaMAE) -> list[dict[str, Any]]:
    """The optimizer's groups: biases, norms and the mask token have no weight decay."""
    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())


def run(job: PretrainJob) -> None:
    """Trains to the end. An early end prints one line and sets an exit code."""
    run_to_the_end(lambda: train(job))


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
