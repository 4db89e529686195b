"""Fine-tunes a pre-trained encoder as a video classifier, and evaluates it with several clips and crops of each video.

    python examples/finetune.py --preset k400 --checkpoint model.safetensors --train train.csv --val val.csv
    accelerate launch examples/finetune.py --preset ssv2 --checkpoint checkpoint.pth --train train.csv --val val.csv
    python examples/finetune.py --eval-only --checkpoint runs/ft/model.safetensors --val val.csv --output runs/eval
    python examples/finetune.py --preset sprites --checkpoint runs/sprites/model.safetensors    generated clips

--checkpoint takes files of pretrain.py, official AdaMAE and VideoMAE files, and folders or files of a Hugging Face
VideoMAE. Without it the model starts from scratch. --resume auto goes on from the newest checkpoint in --output.
Training writes recipe.yaml, metrics.jsonl, TensorBoard files, checkpoints/ and model.safetensors. The evaluation at the
end writes results.json, per_class.csv and predictions.csv.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from common.checkpoint_header import stated_sizes
from common.command_line import is_first_process, num_processes
from common.report import check_output, describe_clips, format_lines
from common.settings import DECODER_SIZES
from training.command_line import Run, parse_arguments
from training.finetune_recipe import FinetuneRecipe
from training.schedule import Schedule, describe_schedule
from video_data.datasets import LabelledData


def main(arguments: list[str]) -> None:
    """Runs the command line. An invalid setting prints one line without a traceback."""
    try:
        taken = ("sampling", "stride", "test_clips", "test_crops") if "--eval-only" in arguments else ()
        recipe, run = parse_arguments(FinetuneRecipe, arguments, "ucf101", __doc__, taken)
        if recipe.eval_only:
            recipe = replace(recipe, train="", effective_batch=None)  # an evaluation uses neither
        data = find_data(recipe, run)
        if is_first_process():
            print(describe(recipe, run, data), flush=True)
        if run.dry_run and run.resume is None and not recipe.checkpoint:
            return
        from pipelines import finetuning  # only now, since torch takes seconds to import

        job = finetuning.build(recipe, data, run.resume)
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not run.dry_run:
        finetuning.run(job, data)


def find_data(recipe: FinetuneRecipe, run: Run) -> LabelledData:
    """The videos and classes; raises ValueError or FileNotFoundError."""
    check_output(recipe.output, *(["results.json"] if recipe.eval_only else []))
    if not recipe.val and not run.dry_run:
        raise ValueError("--val is needed: a list of videos to evaluate on, or 'sprites:1000:1'.")
    if not recipe.train and not run.dry_run and not recipe.eval_only:
        raise ValueError("--train is needed: a list of videos to train on, or 'sprites'.")
    if recipe.eval_only and not recipe.checkpoint:
        raise ValueError("--eval-only needs --checkpoint: the weights of a classifier.")
    if recipe.eval_only and DECODER_SIZES[0] in stated_sizes(recipe.checkpoint):
        raise ValueError(f"{recipe.checkpoint} has no head; --eval-only needs a classifier of finetune.py.")
    stated = stated_sizes(recipe.checkpoint).get("num_classes") if recipe.eval_only else None
    return LabelledData.find(recipe.train, recipe.val, recipe, recipe.num_classes or stated)


def describe(recipe: FinetuneRecipe, run: Run, data: LabelledData) -> str:
    """The resolved recipe as text."""
    views = f"{recipe.test_clips} clips x {recipe.test_crops} crops"
    lines = {
        "settings": run.origin,
        "train": f"{recipe.train}, {len(data.train)} videos" if recipe.train else "none given",
        "val": f"{recipe.val}, {len(data.val)} videos, {views}" if recipe.val else f"none given, {views}",
        "classes": data.describe_classes(),
        "clips": describe_clips(recipe),
        "weights": recipe.checkpoint or "from scratch",
    }
    if recipe.eval_only:
        return format_lines(lines)
    pixels = f"{recipe.randaugment or 'no RandAugment'}, random crops, {'flip' if recipe.flip else 'no flip'}"
    if data.train.sprites is not None:
        pixels = "sprites as they are"
    lines["augmentation"] = (
        f"{pixels}, {recipe.repeats} clips of a video, erasing {recipe.erasing:g}, "
        f"mixup {recipe.mixup:g}, cutmix {recipe.cutmix:g}, smoothing {recipe.smoothing:g}"
    )
    lines["regularised"] = f"layer decay {recipe.layer_decay:g}, drop path {recipe.drop_path:g}" + (
        f", moving average {recipe.ema:g}" if recipe.ema else ""
    )
    schedule = Schedule.of(recipe, len(data.train), num_processes())
    return format_lines(lines | describe_schedule(recipe, schedule, num_processes()))


if __name__ == "__main__":
    main(sys.argv[1:])
