"""What each option of the sampler costs and gives: every variant pre-trained on the same budget, over several seeds.

    python benchmarks/study.py                                  # small clips, with a linear probe; half an hour
    python benchmarks/study.py --size medium --steps 200 --no-probe --output ...       # 512 tokens, adaptivity alone
    python benchmarks/study.py --budget time --output ...       # as many seconds as random masking takes for the steps
    python benchmarks/study.py --size real --no-probe ...       # the bundled video, for the loss alone
    python benchmarks/study.py --size tiny --normalize-target --steps 10000 --no-probe ...     # normalised targets
    python benchmarks/study.py --size gpu --jobs 1 --output ...                        # 1568 tokens, on a GPU

A row for each run: the time of a step relative to random masking, p(moving) / p(still), the share of visible tokens on
what moves, the reconstruction loss and error(moving) / error(still) on one set of random masks, and the accuracy of a
linear probe. Steps of all variants are timed in turns before anything is trained.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from commit import current_commit
from downstream import accuracies
from rows import device_name, read_rows, read_texts, write_rows
from studies import run_all
from study_tables import study_table
from study_variants import SIZES, VARIANTS, Size, variants_help
from timing import ratio, take_turns

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@dataclass(frozen=True)
class Options:
    """Size of the study."""

    variants: tuple[str, ...] = ("random", "tube", "frame", "exact", "fast")
    """Which to compare, see above."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, masks and clips."""
    size: Size = "small"
    """Of clips and model, see above."""
    steps: int = 4000
    """Optimiser steps of random masking."""
    budget: Literal["steps", "time"] = "steps"
    """What is equal: the number of steps, or their time."""
    normalize_target: bool = False
    """Normalised targets, as in the paper, or raw pixels."""
    probe: bool = True
    """Train a linear probe."""
    probe_labels: int = 4000
    """Labelled clips for it."""
    test_clips: int = 2000
    """Clips for its accuracy, of a seed of their own."""
    jobs: int = 2
    """Runs at a time, each in one thread; on a GPU give 1."""
    output: Path = Path(__file__).parent / "results" / "study_cpu.csv"
    """CSV file for the rows. Rows that this study would not make again are never overwritten."""
    add: bool = False
    """Keep the rows that the file has, of the same settings, and do the runs that it lacks. Not with --budget time."""

    def __post_init__(self) -> None:
        if strangers := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"no variant {', '.join(strangers)}; there are {', '.join(VARIANTS)}.")
        for name in ("variants", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        for name in ("steps", "probe_labels", "test_clips", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 1 or more; --no-probe trains no probe.")
        if self.probe and self.size == "real":
            raise ValueError("the bundled video has no labels for a probe: add --no-probe.")
        if self.add and self.budget == "time":
            raise ValueError("--add: steps of equal time are measured anew in each study; use --budget steps.")


@dataclass(frozen=True)
class Row:
    """One run."""

    variant: str
    seed: int
    size: str
    budget: str
    steps: int
    mask_ratio: float  # what it comes to, in whole tokens, places or time steps
    normalize_target: bool
    step_time: float  # relative to random masking, measured in turns
    p_ratio: float | None  # mean p of tokens that move over that of still ones
    visible_moving: float | None  # share of visible tokens that move
    reconstruction: float  # on the same random masks for all
    error_ratio: float | None  # there, error of tokens that move over that of still ones
    probe_top1: float | None  # percent, as the next two
    probe_direction: float | None
    probe_shape: float | None
    seconds: float
    device: str
    torch: str
    commit: str


def arguments(options: Options, variant: str, seed: int) -> list[str]:
    """The command line of pretrain.py, but for its steps and its output."""
    target = "--normalize-target" if options.normalize_target else "--no-normalize-target"
    data = [] if options.size == "real" else ["--data", f"sprites:8000:{seed}"]
    settings = [*SIZES[options.size].split(), *data, *VARIANTS[variant], target, "--seed", str(seed), "--workers", "0"]
    if "--num-masks" not in settings:
        return settings
    # As many masks in a step as the others have, of fewer clips, at the same learning rate.
    from training.command_line import parse_arguments
    from training.pretrain_recipe import PretrainRecipe

    recipe, _ = parse_arguments(PretrainRecipe, settings, "sprites", None)
    fewer = {"--batch-size": recipe.batch_size // recipe.num_masks}
    rates = {"--base-lr": recipe.base_lr * recipe.num_masks, "--min-base-lr": recipe.min_base_lr * recipe.num_masks}
    return [*settings, *(str(each) for pair in (fewer | rates).items() for each in pair)]


def relative_step_times(options: Options) -> dict[str, float]:
    """Seconds of a training step over those of random masking, in turns, on one thread or on the GPU."""
    import torch

    from training.command_line import parse_arguments
    from training.pretrain_recipe import PretrainRecipe

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clocks = {}
    for variant in dict.fromkeys(("random", *options.variants)):
        recipe, _ = parse_arguments(PretrainRecipe, arguments(options, variant, 0), "sprites", None)
        clocks[variant] = _clock(recipe, device)
    times = take_turns(clocks, 60.0, (5, 40))
    return {variant: ratio(times[variant], times["random"]) for variant in options.variants}


def _clock(recipe: Any, device: Any) -> Any:
    """A function that does a step and returns its seconds."""
    import timm
    import torch

    from adamae_sampler import AdaMAELoss

    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)
    criterion = AdaMAELoss(**recipe.loss_args())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    video = torch.rand(recipe.batch_size, 3, recipe.num_frames, *recipe.img_size, device=device)

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction, sample = model(video)
        criterion(prediction, video, sample).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def run(options: Options, variant: str, seed: int, relative: float, folder: str, commit: str) -> Row:
    """Pre-trains, measures and probes once; `commit` is the code's, for the row."""
    began = time.perf_counter()
    import linear_probe
    import pretrain
    import torch

    from training.command_line import parse_arguments
    from training.pretrain_recipe import PretrainRecipe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // options.jobs, 1))
    place = Path(folder) / f"{variant}-{seed}"
    place.mkdir(parents=True)
    steps = options.steps if options.budget == "steps" else max(1, round(options.steps / relative))
    settings = [*arguments(options, variant, seed), "--steps", str(steps), "--output", str(place / "pretrain")]
    top1 = direction = shape = None
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        pretrain.main(settings)
        recipe, _ = parse_arguments(PretrainRecipe, settings, "sprites", None)
        weights = place / "pretrain" / "model.safetensors"
        found = measure(recipe, weights, device)
        if options.probe:
            data = ["--train", f"sprites:{options.probe_labels}:{1000 + seed}", "--val"]
            data += [f"sprites:{options.test_clips}:5000", "--cache", str(place / "cache"), "--workers", "0"]
            probe = ["--checkpoint", str(weights), "--batch-size", "100", "--output", str(place / "probe")]
            linear_probe.main([*probe, *data, "--seed", str(seed)])
            top1, direction, shape = accuracies(place / "probe" / "predictions.csv")
    return Row(
        variant, seed, options.size, options.budget, steps, found.masked, options.normalize_target, relative,
        found.p_ratio, found.visible_moving, found.reconstruction, found.error_ratio, top1, direction, shape,
        time.perf_counter() - began, device_name(device), torch.__version__, commit,
    )  # fmt: skip


class Measured(NamedTuple):
    """Of unseen clips; see `Row`. What asks for tokens that move is None on the bundled video, where none are known."""

    masked: float
    reconstruction: float
    p_ratio: float | None = None
    visible_moving: float | None = None
    error_ratio: float | None = None


def measure(recipe: Any, weights: Path, device: Any) -> Measured:
    """How the masks follow what moves, and the errors on random masks, of unseen clips.

    For masks without a p the share of draws in which a token is visible stands in its place.
    """
    import timm
    import torch
    from pretrain import clip_source

    from adamae_sampler import RandomTokenSampler, reconstruction_error
    from adamae_sampler.models import load_checkpoint
    from video_data.clips import ClipStream
    from video_data.sprites import Sprites

    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)
    load_checkpoint(model, weights)
    model.eval()
    model.sampler.num_masks = 1
    moving: Any = None
    if recipe.data.startswith("sprites"):
        sizes = {"num_frames": recipe.num_frames, "img_size": recipe.img_size[0], "patch_size": recipe.patch_size}
        clips = [Sprites(256, seed=4000, **sizes)[index] for index in range(256)]
        video = torch.stack([clip["video"] for clip in clips])
        moving = torch.stack([clip["moving"] for clip in clips]).to(device)
    else:
        stream = ClipStream(clip_source(recipe), 0, 64, seed=4000)
        video = torch.cat([stream[index]["video"] for index in range(64)])
    generator = torch.Generator(device).manual_seed(0)
    random_masks = RandomTokenSampler(model.sampler.grid_size, recipe.mask_ratio)
    sizes = {"patch_size": recipe.patch_size, "tubelet_size": recipe.tubelet_size}
    visible, weight, errors, targets = [], [], [], []
    with torch.no_grad():
        for part in video.split(32):
            pixels = part.to(device)
            samples = [model.draw_mask(pixels) for _ in range(20)]
            visible.append(torch.stack([~sample.mask for sample in samples]).float().mean(0))
            log_probs = samples[0].log_probs
            weight.append(visible[-1] if log_probs is None else log_probs.exp())
            mask = random_masks(torch.zeros(len(part), random_masks.num_tokens, 1, device=device), generator=generator)
            prediction, sample = model(pixels, mask=mask)
            errors.append(reconstruction_error(prediction, pixels, sample, normalize=recipe.normalize_target, **sizes))
            targets.append(sample.target_idx)
    error, masked = torch.cat(errors), 1 - model.sampler.num_visible / model.sampler.num_tokens
    if moving is None:
        return Measured(masked, float(error.mean()))
    p, seen = torch.cat(weight), torch.cat(visible)
    moves = moving.gather(1, torch.cat(targets))  # [256, M], as the errors
    return Measured(
        masked,
        float(error.mean()),
        float(p[moving].mean() / p[~moving].mean()),
        float(seen[moving].sum() / seen.sum()),
        float(error[moves].mean() / error[~moves].mean()),
    )


def rows_to_keep(options: Options) -> list[Row]:
    """The rows of the output with --add; raises ValueError for rows that would be lost, or are of other settings."""
    rows = read_rows(options.output, Row) if options.output.exists() else []
    equal = options.steps if options.budget == "steps" else None  # of equal time each variant has its own
    mine = options.size, options.budget, equal, options.normalize_target, options.probe
    for row in rows:
        its_equal = row.steps if row.budget == "steps" else None
        its = row.size, row.budget, its_equal, row.normalize_target, row.probe_top1 is not None
        if its != mine:
            raise ValueError(
                f"{options.output} has a run of {row.variant} with (size, budget, steps, normalize_target, "
                f"probe) = {its}, and these are {mine}: give another --output."
            )
    if options.add:
        return rows
    if lost := [f"{row.variant} {row.seed}" for row in rows if (row.variant, row.seed) not in runs_of(options)]:
        raise ValueError(
            f"{options.output} has runs that would be lost, since these do not repeat them: {', '.join(lost)}. "
            "--add keeps them; or give another --output."
        )
    return []


def runs_of(options: Options) -> list[tuple[str, int]]:
    """Variant and seed of each run."""
    return [(variant, seed) for seed in options.seeds for variant in options.variants]


def main(options: Options) -> None:
    """Runs, writes rows as they come, prints the table."""
    began, kept = time.perf_counter(), rows_to_keep(options)
    relative, commit = relative_step_times(options), current_commit()
    with tempfile.TemporaryDirectory() as folder:
        done = {(row.variant, row.seed) for row in kept}
        runs = [each for each in runs_of(options) if each not in done]
        calls = [(options, variant, seed, relative[variant], folder, commit) for variant, seed in runs]
        write_rows(options.output, Row, itertools.chain(kept, run_all(run, calls, options.jobs)))
    print(study_table(read_texts(options.output)))
    print(f"{len(options.seeds)} seeds, {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    about = (
        "Variants, as options of pretrain.py; with R masks of each clip a step has R times fewer clips. Yours go into"
    )
    main(tyro.cli(Options, description=f"{__doc__}\n{about} study_variants.py:\n\n{variants_help()}"))
