"""Pre-training: from a recipe to weights and a picture. `pretrain.py` is its command line."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import default_collate

from adamae_sampler import AdaMAELoss, HardTokenSampler
from adamae_sampler.models import AdaMAE
from adamae_sampler.visualize import animation, overview, save_animation, to_pixels
from common.devices import autocast, make_accelerator
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
from video_data.clips import ClipSource, ClipStream, SpriteClips
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

    pictures = Pictures(job, criterion)
    loop.run(forward, metrics, flops, picture=lambda done: pictures.during(done, loop.model), graph=recipe.graph)
    weights = full_weights(accelerator, loop.model)
    if accelerator.is_main_process:
        finish(job, weights, pictures)
        loop.broken_videos.report()
    accelerator.end_training()


class Pictures:
    """Pictures of one clip during a run, the first that can be read. They change nothing in the run.

    Args:
        job: the run.
        criterion: its loss.
    """

    def __init__(self, job: PretrainJob, criterion: AdaMAELoss) -> None:
        self._job = job
        self._criterion = criterion

    @cached_property
    def _video(self) -> Tensor:
        """[1, 3, T, H, W] uint8."""
        video: Tensor = ClipStream(self._job.source, 0, 1, self._job.recipe.seed)[0]["video"][:1]
        return video.to(self._job.accelerator.device)

    def of(self, model: AdaMAE) -> Figure:
        """The picture of a model with full weights, or of one that FSDP2 shards, if all processes call this."""
        return overview(model, self._video, self._criterion, generator=self._generator())

    def animation_of(self, model: AdaMAE) -> Tensor:
        """The same, frame after frame: [T, height, width, 3] uint8."""
        return animation(model, self._video, self._criterion, generator=self._generator())

    def during(self, done: int, prepared: nn.Module) -> Tensor | None:
        """The picture [H, W, 3] uint8 after step `done`, if one is due and this process has the model's weights."""
        every, accelerator = self._job.recipe.picture_every, self._job.accelerator
        if not every or done % every or not (accelerator.is_main_process or accelerator.distributed_type == "FSDP"):
            return None
        with autocast(accelerator):
            return to_pixels(self.of(accelerator.unwrap_model(prepared, keep_torch_compile=False)))

    def _generator(self) -> torch.Generator:
        """Of its own, so that the run draws the masks that it would draw without pictures."""
        return torch.Generator(self._job.accelerator.device).manual_seed(self._job.recipe.seed)


def finish(job: PretrainJob, weights: dict[str, Tensor], pictures: Pictures) -> None:
    """Writes the weights, a picture and an animation, and says what to see there."""
    recipe, device = job.recipe, job.accelerator.device
    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)  # without DDP or shards around it
    model.load_state_dict(weights)
    names = ("model.safetensors", "overview.png", "animation.gif")
    weights_file, overview_file, animation_file = (recipe.output / name for name in names)
    save_weights(model, weights_file, recipe)
    pictures.of(model).savefig(overview_file, dpi=110)
    save_animation(pictures.animation_of(model), animation_file)
    print(f"wrote {weights_file}, {overview_file}, {animation_file}")
    print(what_to_see(job.source, model))


@torch.no_grad()
def what_to_see(source: ClipSource, model: AdaMAE) -> str:
    """How to read the picture, and for generated clips where p is high."""
    lines = [
        "  Each column of the picture is a moment. The mask hides what is dark. What it shows was drawn from p, which",
        "  is even at the first step. Training raises p where the error is large.",
    ]
    if isinstance(source, SpriteClips):
        clips = default_collate([source.sprites[index] for index in range(min(16, len(source)))])
        sample = model.draw_mask(clips["video"].to(next(model.parameters()).device))
        if sample.log_probs is not None:
            p = sample.log_probs[:: model.sampler.num_masks].exp().cpu() * sample.num_tokens  # [B, N], 1 if even
            moving, still = clips["moving"], clips["still"]
            kinds = {"the sprite that moves": moving, "the still sprite": still, "the background": ~(moving | still)}
            shares = ", ".join(f"{p[kind].mean():.1f} on {name}" for name, kind in kinds.items())
            lines.append(f"  p here, of {len(p)} clips, as a multiple of an even p: {shares}.")
    return "\n".join(lines)
