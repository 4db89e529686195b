"""What a linear readout of frozen features knows about a clip: scores that are bounded, from closed-form fits.

Every fit is ridge regression, so a score depends on the features alone: there is no learning rate, and no seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.masking.atari import ABSENT, GameClips
from benchmarks.masking.clips import SHAPES, Clips, Labelled

Features = Callable[[Tensor], Tensor]
_BATCH = 64  # clips of a forward pass
_RIDGE = 1e-4  # of the mean variance of a feature
_DIRECTIONS = 8


@dataclass(frozen=True)
class Scores:
    """Of one encoder on the clips of a test; each over all clips, and by size of the mover. Games have the first two.

    Attributes:
        moving: AUC of "this token belongs to what moves", over all tokens.
        position: rank correlation of the mover's place, from tokens averaged over each time step; mean over both axes
            and all steps. Of a game, that of its labels in RAM.
        moving_object: as `moving`, among tokens of objects, moving and still.
        velocity: rank correlation of the velocity, at the tokens of what moves; mean over both axes.
        direction: accuracy of 8 directions, from the same averages as the place.
        shape: accuracy of four shapes, from these averages.
    """

    moving: list[float]
    position: list[float]
    moving_object: list[float] | None = None
    velocity: list[float] | None = None
    direction: list[float] | None = None
    shape: list[float] | None = None


@torch.no_grad()
def read_out(features: Features, train: Labelled, test: Labelled) -> Scores:
    """Fits on the clips of `train`, and scores on `test`.

    Args:
        features: [B, C, T, H, W] uint8 -> [B, N, D].
        train: clips to fit on.
        test: clips to score on.
    """
    fits: dict[str, _Ridge] = {}
    for name, inputs, targets in _observations(features, train):
        fits.setdefault(name, _Ridge()).add(inputs, targets)
    solved = {name: fit.solve() for name, fit in fits.items()}
    found: dict[str, list[Tensor]] = {}
    for name, inputs, _ in _observations(features, test):
        found.setdefault(name, []).append(_with_one(inputs) @ solved[name])
    outputs = {name: torch.cat(each) for name, each in found.items()}
    if isinstance(test, GameClips):
        return _of_game(outputs, test)
    if isinstance(test, Clips):
        return _of_scene(outputs, test)
    raise TypeError(f"clips are {type(test).__name__}, expected those of a scene or a game.")


def _observations(features: Features, clips: Labelled) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Inputs [rows, D] and targets [rows, values] of each fit, batch by batch."""
    for at in range(0, len(clips), _BATCH):
        part = slice(at, at + _BATCH)
        tokens = features(clips.video[part]).double()  # [B, N, D]
        moving = clips.moving[part]
        yield "moving", tokens.flatten(0, 1), moving.flatten()[:, None].double()
        steps = clips.cut.grid[0]
        pooled = tokens.unflatten(1, (steps, -1)).mean(2)  # [B, T', D]
        if isinstance(clips, GameClips):
            for index, places in enumerate(_places(clips)[part].unbind(1)):  # [B, T']
                shown = places != ABSENT
                yield f"label {index}", pooled[shown], places[shown][:, None].double()
        if not isinstance(clips, Clips):
            continue
        still = clips.still[part]
        objects = moving | still
        yield "moving_object", tokens[objects], moving[objects][:, None].double()
        velocity = clips.velocity[part].repeat_interleave(tokens.shape[1] // steps, 1)  # [B, N, 2]
        yield "velocity", tokens[moving], velocity[moving].double()
        targets = [_one_hot(direction(clips)[part], _DIRECTIONS), _one_hot(clips.shape[part], len(SHAPES))]
        yield "clip", pooled.flatten(1), torch.cat([*targets, clips.position[part].flatten(1).double()], 1)


def direction(clips: Clips) -> Tensor:
    """[n] one of 8 directions of the first time step."""
    y, x = clips.velocity[:, 0].unbind(1)
    return (torch.atan2(y, x) / (2 * torch.pi) * _DIRECTIONS).round().long() % _DIRECTIONS


def _places(clips: GameClips) -> Tensor:
    """[n, labels, T'], in the last frame of each time step."""
    tubelet = clips.cut.tubelet
    return clips.labels[:, :, tubelet - 1 :: tubelet]


def _of_game(outputs: dict[str, Tensor], test: GameClips) -> Scores:
    labels = [
        rank_correlation(outputs[f"label {index}"], places[places != ABSENT][:, None])
        for index, places in enumerate(_places(test).unbind(1))
    ]
    tokens = outputs["moving"].view(test.moving.shape)
    return Scores(moving=moving_auc(tokens, test), position=[statistics.mean(labels)])


def _of_scene(outputs: dict[str, Tensor], test: Clips) -> Scores:
    rows = _Rows(test)
    places = outputs["clip"][:, _DIRECTIONS + len(SHAPES) :]
    of_direction = outputs["clip"][:, :_DIRECTIONS].argmax(1) == direction(test)
    of_shape = outputs["clip"][:, _DIRECTIONS:].narrow(1, 0, len(SHAPES)).argmax(1) == test.shape

    def each(score: Callable[[Tensor], float]) -> list[float]:
        return [score(chosen) for chosen in test.by_size()]

    return Scores(
        moving=moving_auc(outputs["moving"].view(test.moving.shape), test),
        moving_object=each(lambda chosen: auc(*rows.objects(outputs["moving_object"][:, 0], chosen))),
        velocity=each(lambda chosen: rank_correlation(*rows.velocity(outputs["velocity"], chosen))),
        direction=each(lambda chosen: of_direction[chosen].double().mean().item()),
        position=each(lambda chosen: rank_correlation(places[chosen], test.position[chosen].flatten(1))),
        shape=each(lambda chosen: of_shape[chosen].double().mean().item()),
    )


def moving_auc(tokens: Tensor, test: Labelled) -> list[float]:
    """AUC of "this token belongs to what moves" from [n, N], over all clips and by size of the mover."""
    return [auc(tokens[chosen].flatten(), test.moving[chosen].flatten()) for chosen in test.by_size()]


class _Rows:
    """Finds the rows of chosen clips among those of tokens."""

    def __init__(self, clips: Clips) -> None:
        self._clips, self._objects = clips, clips.moving | clips.still

    def objects(self, output: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = chosen[:, None].expand_as(self._objects)[self._objects]
        return output[rows], self._clips.moving[self._objects][rows]

    def velocity(self, output: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        moving = self._clips.moving
        rows = chosen[:, None].expand_as(moving)[moving]
        steps = self._clips.velocity.shape[1]
        velocity = self._clips.velocity.repeat_interleave(moving.shape[1] // steps, 1)[moving]
        return output[rows], velocity[rows]


class _Ridge:
    """Ridge regression with a constant, from sums over batches."""

    def __init__(self) -> None:
        self._gram: Tensor | float = 0.0
        self._moment: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        inputs = _with_one(inputs)
        self._gram = self._gram + inputs.T @ inputs
        self._moment = self._moment + inputs.T @ targets

    def solve(self) -> Tensor:
        gram = torch.as_tensor(self._gram)
        count = gram[-1, -1]
        mean = gram[-1] / count
        spread = gram.diagonal() / count - mean**2  # variances; 0 for the constant
        penalty = torch.full_like(mean, (_RIDGE * spread[:-1].mean() * count).item())
        penalty[-1] = 0
        return torch.linalg.solve(gram + penalty.diag(), torch.as_tensor(self._moment))


def _with_one(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)


def _one_hot(labels: Tensor, number: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, number).double()


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative; ties count a half."""
    ranks = _ranks(score)
    positives, negatives = positive.sum().double(), (~positive).sum().double()
    return ((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def rank_correlation(output: Tensor, target: Tensor) -> float:
    """Spearman's correlation of each column [rows, columns], averaged over columns."""
    each = []
    for one, other in zip(output.unbind(1), target.unbind(1), strict=True):
        each.append(torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1])
    return torch.stack(each).mean().item()


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1; ties share their mean."""
    _, inverse, counts = torch.unique(x.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
