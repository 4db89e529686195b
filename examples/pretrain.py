"""Pre-trains a video masked autoencoder with adaptive masking, or with another of `--masking`.

    python examples/pretrain.py                                       a small model on generated clips, two minutes
    python examples/pretrain.py --data sprites --masking random       generated clips, another masking
    python examples/pretrain.py --preset k400 --data train.csv        the paper's recipe (k400, ssv2, ucf101, hmdb51)
    accelerate launch examples/pretrain.py --preset ssv2 --data DIR   on all GPUs of a machine
    accelerate launch --config_file examples/launch/fsdp2.yaml ...    with FSDP2; see examples/launch for more

Training writes recipe.yaml, metrics.jsonl, TensorBoard files, checkpoints/, model.safetensors,
overview.png and animation.gif.
--resume auto goes on from the newest checkpoint in --output. Without a checkpoint there, a new run begins.
"""

from __future__ import annotations

import sys
from dataclasses import fields

from common.command_line import is_first_process, num_processes
from common.report import check_output, describe_clips, format_lines
from training.command_line import Run, parse_arguments
from training.pretrain_recipe import SAMPLER_SETTINGS, PretrainRecipe
from training.schedule import Schedule, describe_schedule
from video_data.datasets import VideoDataset


def main(arguments: list[str]) -> None:
    """Runs the command line. An invalid setting prints one line without a traceback."""
    try:
        recipe, run = parse_arguments(PretrainRecipe, arguments, "demo", __doc__)
        data = find_data(recipe, run)
        if is_first_process():
            print(describe(recipe, run, data), flush=True)
        if run.dry_run and run.resume is None:
            return
        from pipelines import pretraining  # only now, since torch takes seconds to import

        job = pretraining.build(recipe, data, run.resume)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not run.dry_run:
        pretraining.run(job)


def find_data(recipe: PretrainRecipe, run: Run) -> VideoDataset:
    """The videos of --data; none in a dry run without it. Raises ValueError or FileNotFoundError."""
    check_output(recipe.output)
    if not recipe.data and not run.dry_run:
        raise ValueError(f"preset {run.preset} needs --data: a folder of videos, or a list file.")
    return VideoDataset.find(recipe.data, recipe)


def describe(recipe: PretrainRecipe, run: Run, data: VideoDataset) -> str:
    """The resolved recipe as text."""
    grid = recipe.grid
    tokens = grid[0] * grid[1] * grid[2]
    schedule = Schedule.of(recipe, len(data), num_processes())
    lines = {
        "settings": run.origin,
        "data": f"{recipe.data}, {len(data)} videos" if recipe.data else "none given",
        "clips": f"{describe_clips(recipe)}, {'flip' if recipe.flip else 'no flip'}",
        "masking": f"{recipe.masking}, {recipe.mask_ratio:.1%} of {tokens} tokens masked" + describe_options(recipe),
        "target": f"{'normalised' if recipe.normalize_target else 'raw'} pixels, {recipe.loss}, sampling weight "
        f"{recipe.sampling_weight:g}",
    }
    return format_lines(lines | describe_schedule(recipe, schedule, num_processes()))


def describe_options(recipe: PretrainRecipe) -> str:
    """The settings that differ from the paper's method."""
    names = (*SAMPLER_SETTINGS, "num_masks", "decode_ratio", "target_ratio", "fused_head", "estimator")
    usual = {each.name: each.default for each in fields(recipe)}
    changed = {name: value for name in names if (value := getattr(recipe, name)) != usual[name]}
    return "".join(f", {name}={value}" for name, value in changed.items())


if __name__ == "__main__":
    main(sys.argv[1:])
