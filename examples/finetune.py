"""Fine-tunes a pre-trained encoder as a video classifier, and evaluates it with several clips and crops of each video.

    python examples/finetune.py --preset k400 --checkpoint model.safetensors --train train.csv --val val.csv
    accelerate launch examples/finetune.py --preset ssv2 --checkpoint checkpoint.pth --train train.csv --val val.csv
    python examples/finetune.py --eval-only --checkpoint runs/ft/model.safetensors --val val.csv --output runs/eval
    python examples/finetune.py --preset sprites --checkpoint runs/sprites/model.safetensors    generated clips

--checkpoint takes files of pretrain.py, official AdaMAE and VideoMAE files, and folders or files of a Hugging Face
VideoMAE; without it the model starts from scratch. Writes recipe.yaml, metrics.jsonl, TensorBoard files, checkpoints/
(for --resume; "auto" is the newest in --output), model.safetensors, and results.json, per_class.csv and predictions.csv
of the evaluation at the end.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamae_sampler.models import VideoClassifier, load_checkpoint
from common.checkpoints import DECODER_SIZES, save_weights, size_note, stated_sizes
from common.cli import Run, parse_arguments
from common.costs import forward_flops
from common.datasets import ClipSource
from common.devices import Normalise, make_accelerator, precision_of
from common.endings import run_to_the_end
from common.engine import Loop, Resumed
from common.evaluation import Evaluation, evaluate, write_results
from common.finetune_recipe import FinetuneRecipe
from common.metrics import DeviceMetrics
from common.recipe import Schedule
from common.report import (
    check_output,
    describe_clips,
    describe_encoder,
    describe_training,
    format_lines,
    report_left_out,
)
from common.sources import Labelled, check_apart, describe_classes
from common.transforms import seed_libraries
from common.whole import on_every_process


@dataclass
class Job:
    """What a recipe and the command line come to."""

    accelerator: Accelerator
    model: VideoClassifier
    val: Labelled
    clips: ClipSource
    schedule: Schedule
    resumed: Resumed | None
    names: list[str]  # of the classes
    left_out: list[str]  # messages about videos of train
    val_left_out: list[str]  # and of val, whose labels are out of range


def build(recipe: FinetuneRecipe, run: Run) -> Job:
    """Finds the data, makes the model and loads its weights; raises ValueError or FileNotFoundError."""
    check_output(recipe.output, *(["results.json"] if recipe.eval_only else []))
    if not recipe.val and not run.dry_run:
        raise ValueError("--val is needed: a list of videos to evaluate on, or 'sprites:1000:1'.")
    if not recipe.train and not run.dry_run and not recipe.eval_only:
        raise ValueError("--train is needed: a list of videos to train on, or 'sprites'.")
    if recipe.eval_only and not recipe.checkpoint:
        raise ValueError("--eval-only needs --checkpoint: the weights of a classifier.")
    if recipe.eval_only and DECODER_SIZES[0] in stated_sizes(recipe.checkpoint):
        raise ValueError(f"{recipe.checkpoint} has no head; --eval-only needs a classifier, a file of finetune.py.")
    accelerator = make_accelerator(recipe.precision, recipe.compile == "whole", recipe.tracker)
    if recipe.ema and accelerator.distributed_type == "FSDP":
        raise ValueError("--ema needs the whole weights on each device, which FSDP2 shards; use DDP or --ema None.")
    train = Labelled.find("" if recipe.eval_only else recipe.train, recipe)
    val = Labelled.find(recipe.val, recipe)
    check_apart(train, val)
    stated = stated_sizes(recipe.checkpoint).get("num_classes") if recipe.eval_only else None
    num_classes = recipe.num_classes or stated or max(train.num_classes, val.num_classes, 2)
    left_out, val_left_out = train.drop_labels(num_classes), val.drop_labels(num_classes)
    names, clips = val.class_names(num_classes), train.clips(recipe)

    batch = replace(recipe, effective_batch=None) if recipe.eval_only else recipe  # which then is of no concern
    schedule = Schedule.of(batch, len(train), accelerator.num_processes)
    set_seed(recipe.seed)  # the same weights on every process
    known = timm.list_models("adamae_vit*")
    if recipe.model not in known:
        raise ValueError(f"no model {recipe.model!r}; there are {', '.join(known)}.")
    model: VideoClassifier = timm.create_model(recipe.model, **recipe.model_args(num_classes))
    model.set_grad_checkpointing(recipe.checkpoint_activations)
    resumed = Resumed.load(run.resume, recipe, schedule, clips)
    if accelerator.is_main_process:
        print(describe(recipe, run.origin, schedule, model, accelerator, train, val))
        if resumed:
            print(resumed.describe(accelerator, recipe))
    if recipe.checkpoint and resumed is None:
        report = load_checkpoint(model, recipe.checkpoint, only="" if recipe.eval_only else "encoder.")
        if accelerator.is_main_process:
            print(f"{'weights':>13}  {recipe.checkpoint}: {report}{size_note(recipe.checkpoint, recipe)}")
    model.to(accelerator.device)
    return Job(accelerator, model, val, clips, schedule, resumed, names, left_out, val_left_out)


class Criterion:
    """From a batch of pixels to the loss: normalisation, random erasing and mixup on the device, cross-entropy.

    Args:
        recipe: the settings.
        model: the classifier, prepared.
        num_classes: its outputs.
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
            # One share for a batch, of mixup or CutMix with equal chances.
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)

    def __call__(self, batch: dict[str, Any], number: int) -> Tensor:
        """The loss of a batch, the `number`-th of the run on this process."""
        # By position, so that a resumed run needs nothing else.
        seed_libraries(random.Random(self.seed + 104_729 * number).getrandbits(31))
        video, target = self.augment(batch["video"], batch["label"])
        return cross_entropy(self.model(video).float(), target, label_smoothing=0.0 if self.mixup else self.smoothing)

    def augment(self, video: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] uint8, [B] -> the clips in fp32, and labels or, with mixup, shares of classes [B, classes].

        timm's tools take images; frames stand as channels, so that a box is the same in all of them.
        """
        images = self.normalise(video).flatten(1, 2)  # [B, C T, H, W]
        images = self.erase(images)
        if self.mixup is not None:
            images, label = self.mixup(images, label)
        return images.view(video.shape), label


def train(recipe: FinetuneRecipe, job: Job) -> None:
    """Trains, with an evaluation by one view every few epochs; weights are written at the end."""
    accelerator, schedule, model, resumed = job.accelerator, job.schedule, job.model, job.resumed
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, model.no_weight_decay(), layer_decay=recipe.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=recipe.betas, fused=True)
    flops = forward_flops(model, 1, 3, recipe.num_frames, *recipe.img_size)
    better = ("val_top1", 1)
    loop = Loop.begin(recipe, schedule, accelerator, model, optimizer, job.clips, resumed, better)
    average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if average is not None and resumed:
        average.load_state_dict(resumed.state["extra"]["ema"])
    metrics = DeviceMetrics(accelerator.device)
    criterion = Criterion(recipe, loop.model, model.num_classes, accelerator)
    steps_between = round(recipe.eval_every * schedule.clips / schedule.effective_batch) or 1

    def forward(batch: dict[str, Any], number: int) -> Tensor:
        loss = criterion(batch, number)
        metrics.add_loss("loss", loss)
        return loss

    def evaluate_now(done: int) -> dict[str, float]:
        if average is not None:
            average.update(model)
        if not recipe.eval_every or done % steps_between or done == schedule.steps:
            return {}
        now = average.module if average else unsharded(recipe, job, loop.model)
        result = run_evaluation(recipe, job, now, clips=1, crops=1)
        return {"val_top1": 100 * result.top(1), "val_top5": 100 * result.top(5)}

    def extra() -> Mapping[str, Any]:
        return {"ema": average.state_dict()} if average is not None else {}

    loop.run(forward, metrics, flops, evaluate_now, extra)
    job.model = average.module if average else unsharded(recipe, job, loop.model)
    if accelerator.is_main_process:
        save_weights(job.model, recipe.output / "model.safetensors", recipe)
        loop.quarantine.report()


def unsharded(recipe: FinetuneRecipe, job: Job, prepared: nn.Module) -> VideoClassifier:
    """The model for evaluation, in which each process has its own number of batches: without FSDP2's shards, for which
    the processes would wait for each other."""
    if job.accelerator.distributed_type != "FSDP":
        return job.model
    model: VideoClassifier = timm.create_model(recipe.model, **recipe.model_args(job.model.num_classes))
    model.load_state_dict(on_every_process(prepared))
    return model.to(job.accelerator.device)


def run_evaluation(recipe: FinetuneRecipe, job: Job, model: nn.Module, clips: int, crops: int) -> Evaluation:
    """Evaluates on `val` with so many views."""
    source = job.val.views(recipe, clips, crops)
    return evaluate(model, source, job.accelerator, recipe.eval_batch_size, recipe.workers)


def finish(recipe: FinetuneRecipe, job: Job) -> None:
    """The evaluation at the end, and its files."""
    result = run_evaluation(recipe, job, job.model, recipe.test_clips, recipe.test_crops)
    if not job.accelerator.is_main_process:
        return
    views = "1" if job.val.sprites is not None else f"{recipe.test_clips} clips x {recipe.test_crops} crops"
    settings = {"val": recipe.val, "checkpoint": recipe.checkpoint, "views": views, "seed": recipe.seed}
    result = replace(result, left_out=[*job.val_left_out, *result.left_out])
    write_results(recipe.output, result, job.names, job.val.describe, settings)
    summary = result.summary()
    print(
        f"top-1 {summary['top1']:.2f}%, top-5 {summary['top5']:.2f}% of {summary['videos']} videos, views: {views}; "
        f"wrote {', '.join(str(recipe.output / name) for name in ('results.json', 'per_class.csv', 'predictions.csv'))}"
    )
    left_out = [*job.left_out, *result.left_out]
    report_left_out(recipe.output / "left_out.txt", left_out, "could not be used and were left out")


def describe(
    recipe: FinetuneRecipe,
    origin: str,
    schedule: Schedule,
    model: VideoClassifier,
    accelerator: Accelerator,
    train: Labelled,
    val: Labelled,
) -> str:
    """The resolved recipe, for people."""
    lines = {
        "settings": origin,
        "train": f"{recipe.train or 'none given'}, {len(train)} videos",
        "val": f"{recipe.val or 'none given'}, {len(val)} videos, {recipe.test_clips} clips x {recipe.test_crops} "
        "crops",
        "classes": f"{model.num_classes}; " + describe_classes(train, val),
        "clips": describe_clips(recipe),
        "model": f"{describe_encoder(recipe.model, model)}, {recipe.checkpoint or 'from scratch'}",
    }
    if recipe.eval_only:
        return format_lines(lines | {"device": f"{accelerator.device}, {precision_of(accelerator)}"})
    pixels = f"{recipe.randaugment or 'no RandAugment'}, random crops, {'flip' if recipe.flip else 'no flip'}"
    lines["augmentation"] = (
        f"{pixels if train.sprites is None else 'sprites as they are'}, {recipe.repeats} clips of a video, erasing "
        f"{recipe.erasing:g}, mixup {recipe.mixup:g}, cutmix {recipe.cutmix:g}, smoothing {recipe.smoothing:g}"
    )
    lines["regularised"] = f"layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}" + (
        f", moving average {recipe.ema:g}" if recipe.ema else ""
    )
    return format_lines(lines | describe_training(recipe, schedule, model, accelerator, len(train)))


def main(arguments: list[str]) -> None:
    """Runs the command line; a setting that cannot be is one line, without a traceback."""
    try:
        taken = ("sampling", "stride", "test_clips", "test_crops") if "--eval-only" in arguments else ()
        recipe, run = parse_arguments(FinetuneRecipe, arguments, "ucf101", __doc__, taken)
        job = build(recipe, run)
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if run.dry_run:
        return

    def all_of_it() -> None:
        if not recipe.eval_only:
            train(recipe, job)
        finish(recipe, job)

    run_to_the_end(all_of_it)
    job.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
