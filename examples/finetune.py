"""Fine-tunes a pre-trained encoder as a video classifier, and evaluates it with several clips and crops of each video.

    python examples/finetune.py --preset k400 --checkpoint model.safetensors --train train.csv --val val.csv
    accelerate launch examples/finetune.py --preset ssv2 --checkpoint checkpoint.pth --train train.csv --val val.csv
    python examples/finetune.py --eval-only --checkpoint runs/ft/model.safetensors --val val.csv --output runs/eval
    python examples/finetune.py --preset sprites --checkpoint runs/sprites/model.safetensors    generated clips

--checkpoint takes files of pretrain.py, official AdaMAE and VideoMAE files, and folders or files of a Hugging Face
VideoMAE; without it the model starts from scratch. Writes metrics.jsonl, TensorBoard files, state.pt (for --resume),
model.safetensors, and results.json, per_class.csv and predictions.csv of the evaluation at the end.
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
from common.datasets import ClipSource
from common.engine import (
    Loop,
    Normalise,
    check_output,
    describe_clips,
    describe_encoder,
    describe_precision,
    describe_training,
    format_lines,
    load_clips,
    make_accelerator,
    report_left_out,
)
from common.evaluation import Evaluation, evaluate, write_results
from common.finetune_recipe import FinetuneRecipe
from common.metrics import DeviceMetrics, RunLog
from common.recipe import Schedule
from common.sources import Labelled, check_apart, describe_classes
from common.state import load_state, restore_random_state, set_aside
from common.transforms import seed_libraries
from common.video import VideoError


@dataclass
class Job:
    """What a recipe and the command line come to."""

    accelerator: Accelerator
    model: VideoClassifier
    val: Labelled
    clips: ClipSource
    schedule: Schedule
    state: dict[str, Any] | None
    names: list[str]  # of the classes
    left_out: list[str]  # messages about videos of train
    val_left_out: list[str]  # and of val, whose labels are out of range
    continues_in_place: bool


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
    accelerator = make_accelerator(recipe.precision)
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
    state = load_state(run.resume, recipe, schedule, accelerator.num_processes) if run.resume else None
    if accelerator.is_main_process:
        print(describe(recipe, run.preset, schedule, model, accelerator, train, val))
        if state is not None:
            print(f"{'resumes':>13}  {run.resume} from step {state['step']}")
    if recipe.checkpoint and state is None:
        report = load_checkpoint(model, recipe.checkpoint, only="" if recipe.eval_only else "encoder.")
        if accelerator.is_main_process:
            print(f"{'weights':>13}  {recipe.checkpoint}: {report}{size_note(recipe.checkpoint, recipe)}")
    model.to(accelerator.device)
    in_place = run.resume is not None and run.resume.resolve().parent == recipe.output.resolve()
    return Job(accelerator, model, val, clips, schedule, state, names, left_out, val_left_out, in_place)


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
    accelerator, schedule, model, state = job.accelerator, job.schedule, job.model, job.state
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, model.no_weight_decay(), layer_decay=recipe.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=recipe.betas, fused=True)
    first_step = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    batches = load_clips(recipe, schedule, job.clips, first_step)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    average = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
    if average is not None and state is not None:
        average.load_state_dict(state["extra"]["ema"])
    set_seed(recipe.seed, device_specific=True)  # from here on, other dropout on every process
    if state is not None:
        restore_random_state(state, accelerator)
    if accelerator.is_main_process and not job.continues_in_place and (earlier := set_aside(recipe.output)):
        print(f"{'set aside':>13}  the earlier run is now {earlier}")

    metrics = DeviceMetrics(accelerator.device)
    criterion = Criterion(recipe, wrapped, model.num_classes, accelerator)
    steps_between = round(recipe.eval_every * schedule.clips / schedule.effective_batch) or 1

    def forward(batch: dict[str, Any], number: int) -> Tensor:
        loss = criterion(batch, number)
        metrics.add_loss("loss", loss)
        return loss

    def after_step(done: int, log: RunLog) -> None:
        if average is not None:
            average.update(model)
        if recipe.eval_every and done % steps_between == 0 and done < schedule.steps:
            result = run_evaluation(recipe, job, average.module if average else model, clips=1, crops=1)
            log.write(done, {"val_top1": 100 * result.top(1), "val_top5": 100 * result.top(5)})

    def extra() -> Mapping[str, Any]:
        return {"ema": average.state_dict()} if average is not None else {}

    loop = Loop(recipe, schedule, accelerator, wrapped, optimizer, metrics, forward, after_step, extra)
    job.left_out += loop.run(batches, first_step)
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    if accelerator.is_main_process:
        save_weights(model, recipe.output / "model.safetensors", recipe)


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
    report_left_out(
        recipe.output / "left_out.txt", left_out, "could not be used; training took others, evaluation left them out"
    )


def describe(
    recipe: FinetuneRecipe,
    preset: str,
    schedule: Schedule,
    model: VideoClassifier,
    accelerator: Accelerator,
    train: Labelled,
    val: Labelled,
) -> str:
    """The resolved recipe, for people."""
    lines = {
        "preset": preset,
        "train": f"{recipe.train or 'none given'}, {len(train)} videos",
        "val": f"{recipe.val or 'none given'}, {len(val)} videos, {recipe.test_clips} clips x {recipe.test_crops} "
        "crops",
        "classes": f"{model.num_classes}; " + describe_classes(train, val),
        "clips": describe_clips(recipe),
        "model": f"{describe_encoder(recipe.model, model)}, {recipe.checkpoint or 'from scratch'}",
    }
    if recipe.eval_only:
        return format_lines(lines | {"device": f"{accelerator.device}, {describe_precision(accelerator)}"})
    pixels = f"{recipe.randaugment or 'no RandAugment'}, random crops, {'flip' if recipe.flip else 'no flip'}"
    lines["augmentation"] = (
        f"{pixels if train.sprites is None else 'sprites as they are'}, {recipe.repeats} clips of a video, erasing "
        f"{recipe.erasing:g}, mixup {recipe.mixup:g}, cutmix {recipe.cutmix:g}, smoothing {recipe.smoothing:g}"
    )
    lines["regularised"] = f"layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}" + (
        f", moving average {recipe.ema:g}" if recipe.ema else ""
    )
    return format_lines(lines | describe_training(recipe, schedule, accelerator, len(train)))


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
    try:
        if not recipe.eval_only:
            train(recipe, job)
        finish(recipe, job)
    except VideoError as error:  # nothing left to train on; a worker puts its traceback before the message
        sys.exit(f"error: {str(error).rpartition('VideoError: ')[2].strip()}")
    job.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
