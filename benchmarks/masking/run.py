"""One run: an arm and a seed, from the initial encoder to the scores of its features."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from adamae_sampler import AdaMAELoss, MaskSample, RandomTokenSampler, reconstruction_error
from adamae_sampler.models import AdaMAE
from benchmarks.core.rows import device_name
from benchmarks.masking.arms import ARMS, SETTINGS, SUPERVISED, UNTRAINED
from benchmarks.masking.clips import Cut, Labelled
from benchmarks.masking.readout import moving_auc, read_out
from benchmarks.masking.train import Setting, build, features, fine_tune, pretrain, supervise

_FIT_SEED, _TEST_SEED, _TRAIN_SEED, _MASK_SEED = 7, 8, 100, 9  # a run's clips are of _TRAIN_SEED + its seed
_BATCH = 64
ALL = 0  # the size of a row over all sizes


@dataclass(frozen=True)
class Task:
    """What a run is of, and may be repeated by.

    Attributes:
        arm: a key of ARMS.
        seed: of the initial encoder, the clips, their order and the masks.
        size: a key of SETTINGS.
        steps: optimiser steps.
        lr: the largest learning rate.
        mask_ratio: share of tokens masked.
        normalize: whether targets are normalised per patch.
    """

    arm: str
    seed: int
    size: str
    steps: int
    lr: float
    mask_ratio: float
    normalize: bool


@dataclass(frozen=True, kw_only=True)
class Row(Task):
    """The scores of a run at one size of what moves. An empty field was not measured.

    Attributes:
        mover: area of what moves, in patches; 0 for all clips.
        moving: see `readout.Scores`, as the five after it.
        visible_moving: share of the visible tokens that move.
        visible_still: share of the visible tokens that are of objects which do not move.
        error_moving: error of masked tokens that move, on the same random masks for all arms.
        error_still: that of objects which do not move.
        error_ground: that of the background.
        few_labels: as `moving`, of the encoder fine-tuned on few labelled clips.
        seconds: of the run.
        finished: time of day, UTC.
    """

    mover: int
    moving: float
    moving_object: float | None = None
    velocity: float | None = None
    direction: float | None = None
    position: float | None = None
    shape: float | None = None
    visible_moving: float | None = None
    visible_still: float | None = None
    error_moving: float | None = None
    error_still: float | None = None
    error_ground: float | None = None
    few_labels: float | None = None
    seconds: float
    finished: str
    device: str
    torch: str
    commit: str


def finished(rows: Iterable[Row]) -> dict[Task, dict[int, Row]]:
    """The rows of each run, by size of what moves; a run that was cut short while it was written is left out."""
    runs: dict[Task, dict[int, Row]] = {}
    for row in rows:
        task = Task(**{each.name: getattr(row, each.name) for each in fields(Task)})
        runs.setdefault(task, {})[row.mover] = row
    return {task: run for task, run in runs.items() if set(run) == {ALL, *movers(task)}}


@functools.lru_cache(maxsize=3)
def clips(number: int, seed: int, cut: Cut, device: torch.device) -> Labelled:
    """Clips on a device; the runs of a process share those of a seed."""
    return cut.make(number, seed).to(device)


def movers(task: Task) -> tuple[int, ...]:
    """The areas of what moves, in patches; empty if they are not known."""
    return SETTINGS[task.size].cut.sizes


def patches(cut: Cut) -> dict[str, Any]:
    """The arguments of the losses that say how a clip is cut."""
    return {"patch_size": cut.patch, "tubelet_size": cut.tubelet}


def run(task: Task, commit: str, device: torch.device) -> list[Row]:
    """Trains and scores; a row for all clips, and one for each size of what moves.

    Args:
        task: what to run.
        commit: of the code, for the rows.
        device: where to run it.
    """
    began = time.perf_counter()
    arm = ARMS[task.arm]
    setting = replace(SETTINGS[task.size], steps=task.steps, lr=task.lr, mask_ratio=task.mask_ratio)
    model = build(setting, task.seed, dict(arm.model)).to(device)
    if task.arm != UNTRAINED:
        data = clips(setting.clips, _TRAIN_SEED + task.seed, setting.cut, device)
        if task.arm == SUPERVISED:
            head = nn.Linear(model.encoder.pos_embed.shape[-1], 1).to(device)
            steps = supervise(model, head, data, setting, task.seed)
        else:
            criterion = AdaMAELoss(**patches(setting.cut), normalize=task.normalize, **arm.loss)
            steps = pretrain(model, arm.objective(model, criterion), data, setting, task.seed)
        for _ in steps:
            pass
    model.eval()
    fit, test = (clips(setting.probe_clips, seed, setting.cut, device) for seed in (_FIT_SEED, _TEST_SEED))
    test = test.without(fit)  # episodes of a game may have equal clips
    scores = read_out(functools.partial(features, model), fit, test)
    masks = {} if task.arm in (UNTRAINED, SUPERVISED) else measure(model, test, task.normalize)
    if task.arm != SUPERVISED:
        masks["few_labels"] = few_labels(model, fit, test, setting, task.seed)
    known: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit,
    }
    measured = {name: values for name, values in {**vars(scores), **masks}.items() if values is not None}
    return [
        Row(**vars(task), **known, mover=mover, **{name: values[place] for name, values in measured.items()})
        for place, mover in enumerate((ALL, *movers(task)))
    ]


def few_labels(model: AdaMAE, fit: Labelled, test: Labelled, setting: Setting, seed: int) -> list[float]:
    """AUC of "this token belongs to what moves" after fine-tuning on few labelled clips; over all clips and by size."""
    few = fit.first(setting.few)
    tuned = fine_tune(model, few, replace(setting, steps=setting.few_steps, lr=setting.few_lr), seed)
    with torch.no_grad():
        scores = torch.cat([tuned(video) for video in test.video.split(_BATCH)])
    return moving_auc(scores, test)


@torch.no_grad()
def measure(model: AdaMAE, test: Labelled, normalize: bool) -> dict[str, list[float]]:
    """What the arm shows, and its errors on random masks that are the same for all arms; over all clips and by size."""
    drawn, errors = [], []
    torch.manual_seed(_MASK_SEED)
    for video, random in _batches(model, test):
        drawn.append(model.draw_mask(video).mask)
        prediction, sample = model(video, mask=random)
        error = reconstruction_error(prediction, video, sample, normalize=normalize, **patches(test.cut))
        unknown = torch.full_like(random.mask, torch.nan, dtype=error.dtype)
        errors.append(unknown.scatter(1, sample.masked_idx, error))
    visible, error = ~torch.cat(drawn), torch.cat(errors)
    chosen, found = test.by_size(), {}
    for name, of in test.groups.items():
        if name != "ground":
            found[f"visible_{name}"] = [_share(of[each], visible[each]) for each in chosen]
        found[f"error_{name}"] = [error[each][of[each]].nanmean().item() for each in chosen]
    return found


def _share(of: Tensor, among: Tensor) -> float:
    return of[among].double().mean().item()


def _batches(model: AdaMAE, test: Labelled) -> Iterator[tuple[Tensor, MaskSample]]:
    """Clips, and random masks for them that depend on nothing but the ratio."""
    generator = torch.Generator(test.video.device).manual_seed(_MASK_SEED)
    random = RandomTokenSampler(model.size.grid, model.sampler.mask_ratio)
    for video in test.video.split(_BATCH):
        yield video, random(torch.zeros(len(video), model.size.num_tokens, 1, device=video.device), generator=generator)
