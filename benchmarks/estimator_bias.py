"""How far each estimator of the sampler's gradient is from the gradient of the expected reconstruction error.

    python -m benchmarks.estimator_bias           # seconds; 2 of 6 tokens visible, by enumeration of all 15 masks

For random scores and random errors of each token under each mask, the expected gradient of the estimator is summed
over all masks and compared with the exact gradient of E[f], f being the mean error of the masked tokens. Three kinds of
errors: any; those of tokens that are hard or easy whatever the mask, as for texture; and those that fall where a
visible token is near, as for what can be predicted from its surroundings. A cosine of 1 is the direction that lowers
E[f], -1 the one that raises it; the relative error is of an estimator scaled as well as it can be.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adamae_sampler import MaskSample, sampling_loss
from adamae_sampler.losses import Estimator
from benchmarks.core.commit import current_commit
from benchmarks.core.rows import RESULTS, read_texts, write_rows
from benchmarks.pages.estimators import estimators_table

_TOKENS, _VISIBLE = 6, 2
_SETS = list(itertools.combinations(range(_TOKENS), _VISIBLE))


@dataclass(frozen=True)
class Options:
    """Size of the measurement."""

    trials: int = 50
    """Number of random scores and errors."""
    spread: float = 1.0
    """Standard deviation of the scores."""
    output: Path = RESULTS / "estimator_bias.csv"
    """CSV file for the rows."""


@dataclass(frozen=True)
class Row:
    """An estimator under one kind of errors."""

    errors: str
    estimator: str
    cosine: float
    cosine_deviation: float
    relative_error: float
    commit: str


def any_errors(draw: torch.Generator) -> dict[tuple[int, ...], Tensor]:
    """The errors of the masked tokens of each mask, in order."""
    return {chosen: torch.rand(_TOKENS - _VISIBLE, generator=draw, dtype=torch.float64) for chosen in _SETS}


def own_errors(draw: torch.Generator) -> dict[tuple[int, ...], Tensor]:
    """A token has its own error, whatever is visible."""
    each = torch.rand(_TOKENS, generator=draw, dtype=torch.float64)
    return {chosen: each[[i for i in range(_TOKENS) if i not in chosen]] for chosen in _SETS}


def near_errors(draw: torch.Generator) -> dict[tuple[int, ...], Tensor]:
    """A token's own error falls with the distance to the nearest visible one."""
    each = torch.rand(_TOKENS, generator=draw, dtype=torch.float64)
    return {
        chosen: torch.stack(
            [each[i] * (1 - 0.8 ** min(abs(i - j) for j in chosen)) for i in range(_TOKENS) if i not in chosen]
        )
        for chosen in _SETS
    }


KINDS: dict[str, Callable[[torch.Generator], dict[tuple[int, ...], Tensor]]] = {
    "any": any_errors,
    "of the token": own_errors,
    "by the nearest visible token": near_errors,
}


def probability(p: Tensor, visible: tuple[int, ...]) -> Tensor:
    """The probability of a set of visible tokens, summed over every order in which they can be drawn."""
    total = torch.zeros((), dtype=p.dtype)
    for order in itertools.permutations(visible):
        chance, left = torch.ones((), dtype=p.dtype), torch.ones((), dtype=p.dtype)
        for token in order:
            chance, left = chance * p[token] / left, left - p[token]
        total = total + chance
    return total


def compare(estimator: Estimator, errors: dict[tuple[int, ...], Tensor], scores: Tensor) -> tuple[float, float]:
    """Cosine with the descent of E[f], and the relative error of the best multiple."""
    scores = scores.detach().requires_grad_()
    log_probs = scores.log_softmax(0)
    masks = [[i not in chosen for i in range(_TOKENS)] for chosen in _SETS]
    sample = MaskSample.from_mask(torch.tensor(masks), _VISIBLE)
    rows = log_probs.expand(len(_SETS), -1)
    sample = sample._replace(log_probs=rows)
    chance = torch.stack([probability(log_probs.exp(), chosen) for chosen in _SETS])
    error = torch.stack([errors[chosen] for chosen in _SETS])
    (exact,) = torch.autograd.grad((chance * error.mean(1)).sum(), scores, retain_graph=True)
    # The mean of every mask's own loss, weighted by its chance; another clip's error is the baseline, so none is here.
    losses = [
        sampling_loss(
            MaskSample(*(each[i : i + 1] for each in (*sample[:3], rows))), error[i : i + 1], estimator=estimator
        )
        for i in range(len(_SETS))
    ]
    (found,) = torch.autograd.grad((chance.detach() * torch.stack(losses)).sum(), scores)
    best = (found @ exact) / (found @ found) * found
    return float(cosine_similarity(found, exact, dim=0)), float((best - exact).norm() / exact.norm())


def main(options: Options) -> None:
    """Measures, writes the rows and prints them."""
    rows = []
    estimators: tuple[Estimator, ...] = ("categorical", "plackett_luce", "plackett_luce_max")
    for kind, make in KINDS.items():
        for estimator in estimators:
            draw = torch.Generator().manual_seed(0)
            found = [
                compare(estimator, make(draw), options.spread * torch.randn(_TOKENS, generator=draw).double())
                for _ in range(options.trials)
            ]
            cosines, errors = zip(*found, strict=True)
            cosine, deviation, error = statistics.mean(cosines), statistics.stdev(cosines), statistics.mean(errors)
            rows.append(Row(kind, estimator, round(cosine, 4), round(deviation, 4), round(error, 4), current_commit()))
    write_rows(options.output, Row, rows)
    print(estimators_table(read_texts(options.output)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
