"""One run of a study: pre-training by examples/pretrain.py, then measures of its masks and features."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import torch
from tqdm import tqdm

from adamae_sampler import AdaMAELoss, RandomTokenSampler, reconstruction_error
from adamae_sampler.models import load_checkpoint
from benchmarks.core.rows import RESULTS, device_name
from benchmarks.core.timing import ratio, take_turns
from benchmarks.studies.variants import SCRATCH, SIZES, VARIANTS, Size

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
import finetune
import linear_probe
import pretrain

from training.command_line import parse_arguments
from training.pretrain_recipe import PretrainRecipe
from video_data.clips import ClipStream
from video_data.sprites import DIRECTIONS, Sprites

T = TypeVar("T")
_ACCURACIES = ("top1", "direction", "shape")  # percent of clips: of the class, its direction, its shape


@dataclass(frozen=True)
class Options:
    """Size of the study."""

    variants: tuple[str, ...] = ("random", "tube", "frame", "exact", "fast")
    """The variants to compare, see above."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, masks and clips."""
    size: Size = "small"
    """Size of clips and model, see above."""
    steps: int = 4000
    """Optimiser steps of random masking."""
    budget: Literal["steps", "time"] = "steps"
    """The runs have the same number of steps, or the same time."""
    mask_ratio: float | None = None
    """Share of tokens masked; that of the size if None."""
    normalize_target: bool = False
    """Normalised targets, as in the paper, or raw pixels."""
    probe: bool = True
    """Train a linear probe."""
    probe_labels: int = 4000
    """Number of labelled clips for it."""
    finetune_steps: int = 0
    """Optimiser steps of fine-tuning, 16 clips each; 0 fine-tunes nothing."""
    finetune_labels: int = 1000
    """Number of labelled clips for it."""
    test_clips: int = 2000
    """Clips for the accuracies, of a seed of their own."""
    jobs: int = 2
    """Runs at a time, each in one thread; on a GPU give 1."""
    output: Path = RESULTS / "study_cpu.csv"
    """CSV file for the rows. Rows that this study would not make again are never overwritten."""
    add: bool = False
    """Keep the rows that the file has, of the same settings, and do the runs that it lacks. Not with --budget time."""

    def __post_init__(self) -> None:
        if strangers := [name for name in self.variants if name not in VARIANTS]:
            raise ValueError(f"no variant {', '.join(strangers)}; there are {', '.join(VARIANTS)}.")
        for name in ("variants", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one.")
        for name in ("steps", "probe_labels", "finetune_labels", "test_clips", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected 1 or more; --no-probe trains no probe.")
        if self.size == "real" and (self.probe or self.finetune_steps):
            raise ValueError("the bundled video has no labels: add --no-probe, and do not fine-tune.")
        if self.add and self.budget == "time":
            raise ValueError("--add: steps of equal time are measured anew in each study; use --budget steps.")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Variant and seed of each run."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. An empty field was not measured."""

    variant: str
    seed: int
    size: str
    budget: str
    steps: int
    mask_ratio: float  # the masked share, in whole tokens, places or time steps
    normalize_target: bool
    step_time: float | None  # relative to random masking, measured in turns
    p_ratio: float | None = None  # mean p of tokens that move over that of still ones
    visible_moving: float | None = None  # share of visible tokens that move
    reconstruction: float | None  # on the same random masks for all
    error_ratio: float | None = None  # there, error of tokens that move over that of still ones
    probe_top1: float | None = None  # percent, as the five other accuracies
    probe_direction: float | None = None
    probe_shape: float | None = None
    finetune_steps: int | None = None
    finetune_labels: int | None = None
    finetune_top1: float | None = None
    finetune_direction: float | None = None
    finetune_shape: float | None = None
    seconds: float
    device: str
    torch: str
    commit: str


def run_all(run: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """The results of run(*call), in order, `jobs` at a time, with a progress bar."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(run, *call) for call in calls]
        for task in tqdm(tasks, unit="run"):
            yield task.result()


def arguments(options: Options, variant: str, seed: int) -> list[str]:
    """The command line of pretrain.py, but for its steps and its output."""
    target = "--normalize-target" if options.normalize_target else "--no-normalize-target"
    data = [] if options.size == "real" else ["--data", f"sprites:8000:{seed}"]
    settings = [*SIZES[options.size].split(), *data, *VARIANTS[variant], target, "--seed", str(seed), "--workers", "0"]
    settings += [] if options.mask_ratio is None else ["--mask-ratio", str(options.mask_ratio)]
    if "--num-masks" not in settings:
        return settings
    # As many masks in a step as the others have, of fewer clips, at the same learning rate.
    recipe = _recipe(settings)
    fewer = {"--batch-size": recipe.batch_size // recipe.num_masks}
    rates = {"--base-lr": recipe.base_lr * recipe.num_masks, "--min-base-lr": recipe.min_base_lr * recipe.num_masks}
    return [*settings, *(str(each) for pair in (fewer | rates).items() for each in pair)]


def _recipe(settings: list[str]) -> PretrainRecipe:
    return parse_arguments(PretrainRecipe, settings, "sprites", None)[0]


def relative_step_times(options: Options) -> dict[str, float]:
    """Seconds of a training step over those of random masking, in turns, on one thread or on the GPU."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = dict.fromkeys(("random", *options.variants))
    clocks = {name: _clock(_recipe(arguments(options, name, 0)), device) for name in names}
    times = take_turns(clocks, 60.0, (5, 40))
    return {variant: ratio(times[variant], times["random"]) for variant in options.variants}


def _clock(recipe: PretrainRecipe, device: torch.device) -> Callable[[], float]:
    """A function that does a step and returns its seconds."""
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
    """Pre-trains once, measures, probes and fine-tunes.

    Args:
        options: of the study.
        variant: a key of VARIANTS.
        seed: of weights, masks and clips.
        relative: seconds of a step over those of random masking.
        folder: for everything that the run writes.
        commit: of the code, for the row.
    """
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // options.jobs, 1))
    place = Path(folder) / f"{variant}-{seed}"
    place.mkdir(parents=True)
    weights = place / "pretrain" / "model.safetensors"
    steps = options.steps if options.budget == "steps" else max(1, round(options.steps / relative))
    trained = variant != SCRATCH  # else one step at learning rate 0 writes the weights that a run starts from
    settings = [*arguments(options, variant, seed), "--steps", str(steps if trained else 1)]
    labels, test, common = f"sprites:{{}}:{1000 + seed}", f"sprites:{options.test_clips}:5000", ["--seed", str(seed)]
    common += ["--workers", "0", "--val", test, "--checkpoint", str(weights)]
    accuracy: dict[str, float] = {}
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        pretrain.main([*settings, "--output", str(weights.parent)])
        found = measure(_recipe(settings), weights, device)
        if options.probe:
            probe = ["--train", labels.format(options.probe_labels), "--cache", str(place / "cache")]
            linear_probe.main([*probe, "--batch-size", "100", *common, "--output", str(place / "probe")])
            accuracy |= accuracies(place / "probe" / "predictions.csv", "probe")
        if options.finetune_steps:
            tuning = ["--preset", "sprites", "--train", labels.format(options.finetune_labels)]
            tuning += ["--steps", str(options.finetune_steps)]
            finetune.main([*tuning, *common, "--output", str(place / "finetune")])
            accuracy |= accuracies(place / "finetune" / "predictions.csv", "finetune")
    return Row(
        variant=variant,
        seed=seed,
        size=options.size,
        budget=options.budget,
        steps=steps if trained else 0,
        normalize_target=options.normalize_target,
        step_time=relative,
        finetune_steps=options.finetune_steps or None,
        finetune_labels=options.finetune_labels if options.finetune_steps else None,
        seconds=time.perf_counter() - began,
        device=device_name(device),
        torch=torch.__version__,
        commit=commit,
        **found,
        **accuracy,
    )


def accuracies(predictions: Path, kind: str) -> dict[str, float]:
    """Percent of clips whose class, direction and shape are right; a class is shape x DIRECTIONS + direction."""
    with predictions.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["label"]), int(row["first five classes"].split()[0])) for row in csv.DictReader(file)]
    right = [(a == b, a % DIRECTIONS == b % DIRECTIONS, a // DIRECTIONS == b // DIRECTIONS) for a, b in rows]
    shares = (100 * sum(column) / len(rows) for column in zip(*right, strict=True))
    return {f"{kind}_{name}": share for name, share in zip(_ACCURACIES, shares, strict=True)}


def measure(recipe: PretrainRecipe, weights: Path, device: torch.device) -> dict[str, Any]:
    """Fields of `Row`: the share of moving tokens in the masks, and the errors on random masks, of unseen clips.

    Random masks have no p: there it is the share of draws in which a token is visible. The bundled video has no tokens
    that are known to move, so its row lacks what is about them.
    """
    model = timm.create_model(recipe.model, **recipe.model_args()).to(device)
    load_checkpoint(model, weights)
    model.eval()
    model.sampler.num_masks = 1
    moving: torch.Tensor | None = None
    if recipe.data.startswith("sprites"):
        sizes = {"num_frames": recipe.num_frames, "img_size": recipe.img_size[0], "patch_size": recipe.patch_size}
        clips = [Sprites(256, seed=4000, **sizes)[index] for index in range(256)]
        video = torch.stack([clip["video"] for clip in clips])
        moving = torch.stack([clip["moving"] for clip in clips]).to(device)
    else:
        stream = ClipStream(pretrain.clip_source(recipe), 0, 64, seed=4000)
        video = torch.cat([stream[index]["video"] for index in range(64)])
    generator = torch.Generator(device).manual_seed(0)
    random_masks = RandomTokenSampler(model.sampler.grid_size, recipe.mask_ratio)
    target: dict[str, Any] = {"normalize": recipe.normalize_target, "patch_size": recipe.patch_size}
    target["tubelet_size"] = recipe.tubelet_size
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
            errors.append(reconstruction_error(prediction, pixels, sample, **target))
            targets.append(sample.target_idx)
    error, masked = torch.cat(errors), 1 - model.sampler.num_visible / model.sampler.num_tokens
    found = {"mask_ratio": masked, "reconstruction": float(error.mean())}
    if moving is None:
        return found
    p, seen = torch.cat(weight), torch.cat(visible)
    moves = moving.gather(1, torch.cat(targets))  # [256, M], as the errors
    return found | {
        "p_ratio": float(p[moving].mean() / p[~moving].mean()),
        "visible_moving": float(seen[moving].sum() / seen.sum()),
        "error_ratio": float(error[moves].mean() / error[~moves].mean()),
    }
