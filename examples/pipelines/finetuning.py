"""Fine-tuning: from a recipe to weights and results. `finetune.py` is its command line."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamae_sampler.models import VideoClassifier, load_checkpoint
from common.checkpoint_header import size_note
from common.devices import Normalise, make_accelerator
from common.models import CLASSIFIERS, save_weights
from common.report import format_lines, report_left_out
from evaluation.multi_view import Evaluation, evaluate, write_results
from training.finetune_recipe import FinetuneRecipe
from training.full_state import full_weights_everywhere
from training.interrupts import run_to_the_end
from training.job import Job
from training.loop import TrainingLoop
from training.metrics import DeviceMetrics
from training.schedule import steps_of_epoch
from training.throughput import forward_flops
from video_data.datasets import LabelledData
from video_data.sources import clip_source, view_source
from video_data.transforms import FinetuneTransform, seed_libraries

FinetuneJob = Job[FinetuneRecipe, VideoClassifier]


def build(recipe: FinetuneRecipe, data: LabelledData, resume: Path | None) -> FinetuneJob:
    """Makes the model and loads its weights; raises ValueError, TypeError or FileNotFoundError."""
    accelerator = make_accelerator(recipe.precision, recipe.compile == "whole", recipe.tracker)
    if recipe.ema and accelerator.distributed_type == "FSDP":
        raise ValueError("--ema needs full weights on each device, and FSDP2 shards them; use DDP, or --ema None.")
    transform = FinetuneTransform(recipe.img_size, recipe.randaugment, recipe.flip)
    source = clip_source(data.train, recipe, transform, recipe.repeats)
    model_args = recipe.model_args(len(data.names))
    job: FinetuneJob = Job.build(recipe, accelerator, source, resume, CLASSIFIERS, model_args)
    if accelerator.is_main_process:
        print(format_lines(job.describe()))
    if recipe.checkpoint and job.resumed is None:
        report = load_checkpoint(job.model, recipe.checkpoint, only="" if recipe.eval_only else "encoder.")
        if accelerator.is_main_process:
            print(f"{'weights':>13}  {recipe.checkpoint}: {report}{size_note(recipe.checkpoint, recipe)}")
    job.model.to(accelerator.device)
    return job


def run(job: FinetuneJob, data: LabelledData) -> None:
    """Trains and evaluates, or only evaluates. An early end prints one line and sets an exit code."""
    run_to_the_end(lambda: finish(job, data, job.model if job.recipe.eval_only else train(job, data)))
    job.accelerator.end_training()


class Criterion:
    """Computes the loss of a batch of pixels: normalisation, random erasing and mixup on the device, cross-entropy.

    Args:
        recipe: the settings.
        model: the classifier, prepared.
        num_classes: number of outputs of the classifier.
        accelerator: devices and processes.
    """

    def __init__(self, recipe: FinetuneRecipe, model: nn.Module, num_classes: int, accelerator: Accelerator) -> None:
        self.model = model
        self.smoothing = recipe.smoothing
        self.seed = recipe.seed * 1_000_003 + accelerator.process_index * 7_919
        self.normalise = Normalise(accelerator.device)
        self.erase = RandomErasing(recipe.erasing, mode="pixel", max_count=1, device=str(accelerator.device))
        self.mixup: Mixup | None = None
        if recipe.mixup or recipe.cutmix:
            # A batch gets mixup or CutMix with equal chances, and one mixing share for all its clips.
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, batch: dict[str, Any], number: int) -> Tensor:
        """The loss of batch `number` of the run on this process."""
        # Seeded by position, so that a resumed run makes the same choices.
        seed_libraries(random.Random(self.seed + 104_729 * number).getrandbits(31))
        video, target = self.augment(batch["video"], batch["label"])
        return cross_entropy(self.model(video).float(), target, label_smoothing=0.0 if self.mixup else self.smoothing)

    def augment(self, video: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] uint8, [B] -> the clips in fp32, and labels or, with mixup, shares of classes [B, classes].

        timm's tools take images. Frames become channels here, so every frame of a clip gets the same box.
        """
        images = self.normalise(video).flatten(1, 2)  # [B, C T, H, W]
        images = self.erase(images)
        if self.mixup is not None:
            images, label = self.mixup(images, label)
        return images.view(video.shape), label


def parameter_groups(recipe: FinetuneRecipe, model: VideoClassifier) -> list[dict[str, Any]]:
    """The optimizer's groups: biases and norms have no weight decay, lower layers a lower learning rate."""
    names = model.no_weight_decay()
    return param_groups_layer_decay(model, recipe.weight_decay, names, layer_decay=recipe.layer_decay)


def train(job: FinetuneJob, data: LabelledData) -> VideoClassifier:
    """Trains, evaluates one view every few epochs, and writes the weights; returns the model that has them."""
    recipe, accelerator, schedule, model = job.recipe, job.accelerator, job.schedule, job.model
    groups = parameter_groups(recipe, model)
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=recipe.betas, fused=True)
    flops = forward_flops(model, 1, 3, recipe.num_frames, *recipe.img_size)
    loop = TrainingLoop(job, optimizer, better=("val_top1", 1))
    average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if average is not None and job.resumed:
        average.load_state_dict(job.resumed.state["extra"]["ema"])
    metrics = DeviceMetrics(accelerator.device)
    criterion = Criterion(recipe, loop.model, model.num_classes, accelerator)
    steps_between = round(recipe.eval_every * steps_of_epoch(schedule.clips, schedule.effective_batch)) or 1

    def forward(batch: dict[str, Any], number: int) -> Tensor:
        loss = criterion(batch, number)
        metrics.add_loss("loss", loss)
        return loss

    def evaluated_model() -> VideoClassifier:
        return average.module if average else unsharded(job, loop.model)

    def evaluate_now(done: int) -> dict[str, float]:
        if average is not None:
            average.update(model)
        if not recipe.eval_every or done % steps_between or done == schedule.steps:
            return {}
        result = run_evaluation(job, data, evaluated_model(), clips=1, crops=1)
        return {"val_top1": 100 * result.top(1), "val_top5": 100 * result.top(5)}

    def extra() -> Mapping[str, Any]:
        return {"ema": average.state_dict()} if average is not None else {}

    loop.run(forward, metrics, flops, evaluate_now, extra)
    trained = evaluated_model()
    if accelerator.is_main_process:
        save_weights(trained, recipe.output / "model.safetensors", recipe)
        loop.broken_videos.report()
    return trained


def unsharded(job: FinetuneJob, prepared: nn.Module) -> VideoClassifier:
    """The model for evaluation, with full weights on every process.

    Processes evaluate different numbers of batches. With FSDP2's shards they would wait for each other forever.
    """
    if job.accelerator.distributed_type != "FSDP":
        return job.model
    model: VideoClassifier = timm.create_model(job.recipe.model, **job.recipe.model_args(job.model.num_classes))
    model.load_state_dict(full_weights_everywhere(prepared))
    return model.to(job.accelerator.device)


def run_evaluation(job: FinetuneJob, data: LabelledData, model: nn.Module, clips: int, crops: int) -> Evaluation:
    """Evaluates a model with `clips` x `crops` views of each video."""
    source = view_source(data.val, job.recipe, clips, crops)
    return evaluate(model, source, job.accelerator, job.recipe.eval_batch_size, job.recipe.readers)


def finish(job: FinetuneJob, data: LabelledData, model: nn.Module) -> None:
    """Evaluates a model with all views, and writes the results."""
    recipe = job.recipe
    result = run_evaluation(job, data, model, recipe.test_clips, recipe.test_crops)
    if not job.accelerator.is_main_process:
        return
    views = f"{recipe.test_clips} clips x {recipe.test_crops} crops" if data.val.sprites is None else "1"
    settings = {"val": recipe.val, "checkpoint": recipe.checkpoint, "views": views, "seed": recipe.seed}
    result = replace(result, left_out=[*data.val_left_out, *result.left_out])
    write_results(recipe.output, result, data.names, data.val.describe, settings)
    files = ", ".join(str(recipe.output / name) for name in ("results.json", "per_class.csv", "predictions.csv"))
    print(f"{result.headline()}, views: {views}; wrote {files}")
    left_out = [*data.train_left_out, *result.left_out]
    report_left_out(recipe.output / "left_out.txt", left_out, "could not be used and were left out")
