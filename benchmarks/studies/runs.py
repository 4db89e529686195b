"""One run of a study: pre-training by examples/pretrain.py, then what its masks and features are worth."""

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
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from benchmarks.core.rows import device_name
from benchmarks.core.timing import ratio, take_turns
from benchmarks.studies.variants import SCRATCH, SIZES, VARIANTS, Size

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

T = TypeVar("T")
Accuracies = tuple[float | None, float | None, float | None]  # percent: of the class, its direction, its shape


@dataclass(frozen=True)
class Plan:
    """The settings of every run of a study; see `benchmarks.study.Options`."""

    size: Size
    steps: int
    budget: str
    mask_ratio: float | None
    normalize_target: bool
    probe: bool
    probe_labels: int
    finetune_steps: int
    finetune_labels: int
    test_clips: int
    jobs: int


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
    step_time: float | None  # relative to random masking, measured in turns
    p_ratio: float | None  # mean p of tokens that move over that of still ones
    visible_moving: float | None  # share of visible tokens that move
    reconstruction: float | None  # on the same random masks for all
    error_ratio: float | None  # there, error of tokens that move over that of still ones
    probe_top1: float | None  # percent, as the five other accuracies
    probe_direction: float | None
    probe_shape: float | None
    finetune_steps: int | None
    finetune_labels: int | None
    finetune_top1: float | None
    finetune_direction: float | None
    finetune_shape: float | None
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


def arguments(plan: Plan, variant: str, seed: int) -> list[str]:
    """The command line of pretrain.py, but for its steps and its output."""
    target = "--normalize-target" if plan.normalize_target else "--no-normalize-target"
    data = [] if plan.size == "real" else ["--data", f"sprites:8000:{seed}"]
    settings = [*SIZES[plan.size].split(), *data, *VARIANTS[variant], target, "--seed", str(seed), "--workers", "0"]
    settings += [] if plan.mask_ratio is None else ["--mask-ratio", str(plan.mask_ratio)]
    if "--num-masks" not in settings:
        return settings
    # As many masks in a step as the others have, of fewer clips, at the same learning rate.
    recipe = _recipe(settings)
    fewer = {"--batch-size": recipe.batch_size // recipe.num_masks}
    rates = {"--base-lr": recipe.base_lr * recipe.num_masks, "--min-base-lr": recipe.min_base_lr * recipe.num_masks}
    return [*settings, *(str(each) for pair in (fewer | rates).items() for each in pair)]


def _recipe(settings: list[str]) -> Any:
    from training.command_line import parse_arguments
    from training.pretrain_recipe import PretrainRecipe

    return parse_arguments(PretrainRecipe, settings, "sprites", None)[0]


def relative_step_times(plan: Plan, variants: Sequence[str]) -> dict[str, float]:
    """Seconds of a training step over those of random masking, in turns, on one thread or on the GPU."""
    import torch

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = dict.fromkeys(("random", *variants))
    clocks = {name: _clock(_recipe(arguments(plan, name, 0)), device) for name in names}
    times = take_turns(clocks, 60.0, (5, 40))
    return {variant: ratio(times[variant], times["random"]) for variant in variants}


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


def run(plan: Plan, variant: str, seed: int, relative: float, folder: str, commit: str) -> Row:
    """Pre-trains once, measures, probes and fine-tunes.

    Args:
        plan: settings of the study.
        variant: a key of VARIANTS.
        seed: of weights, masks and clips.
        relative: seconds of a step over those of random masking.
        folder: for everything that the run writes.
        commit: of the code, for the row.
    """
    began = time.perf_counter()
    import finetune
    import linear_probe
    import pretrain
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // plan.jobs, 1))
    place = Path(folder) / f"{variant}-{seed}"
    place.mkdir(parents=True)
    weights = place / "pretrain" / "model.safetensors"
    steps = plan.steps if plan.budget == "steps" else max(1, round(plan.steps / relative))
    trained = variant != SCRATCH  # else one step at learning rate 0 writes the weights that a run starts from
    settings = [*arguments(plan, variant, seed), "--steps", str(steps if trained else 1)]
    labels, test, common = f"sprites:{{}}:{1000 + seed}", f"sprites:{plan.test_clips}:5000", ["--seed", str(seed)]
    common += ["--workers", "0", "--val", test, "--checkpoint", str(weights)]
    probed: Accuracies = (None, None, None)
    tuned: Accuracies = (None, None, None)
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        pretrain.main([*settings, "--output", str(weights.parent)])
        found = measure(_recipe(settings), weights, device)
        if plan.probe:
            probe = ["--train", labels.format(plan.probe_labels), "--cache", str(place / "cache")]
            linear_probe.main([*probe, "--batch-size", "100", *common, "--output", str(place / "probe")])
            probed = accuracies(place / "probe" / "predictions.csv")
        if plan.finetune_steps:
            tuning = ["--preset", "sprites", "--train", labels.format(plan.finetune_labels)]
            tuning += ["--steps", str(plan.finetune_steps)]
            finetune.main([*tuning, *common, "--output", str(place / "finetune")])
            tuned = accuracies(place / "finetune" / "predictions.csv")
    accuracy: dict[str, Any] = dict(zip(("probe_top1", "probe_direction", "probe_shape"), probed, strict=True))
    accuracy |= zip(("finetune_top1", "finetune_direction", "finetune_shape"), tuned, strict=True)
    return Row(
        variant=variant,
        seed=seed,
        size=plan.size,
        budget=plan.budget,
        steps=steps if trained else 0,
        normalize_target=plan.normalize_target,
        step_time=relative,
        finetune_steps=plan.finetune_steps or None,
        finetune_labels=plan.finetune_labels if plan.finetune_steps else None,
        seconds=time.perf_counter() - began,
        device=device_name(device),
        torch=torch.__version__,
        commit=commit,
        **found._asdict(),
        **accuracy,
    )


def accuracies(predictions: Path) -> tuple[float, float, float]:
    """Percent of clips whose class, direction and shape are right; a class is shape x DIRECTIONS + direction."""
    from video_data.sprites import DIRECTIONS

    with predictions.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["label"]), int(row["first five classes"].split()[0])) for row in csv.DictReader(file)]
    right = [(a == b, a % DIRECTIONS == b % DIRECTIONS, a // DIRECTIONS == b // DIRECTIONS) for a, b in rows]
    of_class, of_direction, of_shape = (100 * sum(column) / len(rows) for column in zip(*right, strict=True))
    return of_class, of_direction, of_shape


class Measured(NamedTuple):
    """Numbers of unseen clips; see `Row`. Those about tokens that move are None for the bundled video."""

    mask_ratio: float
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
