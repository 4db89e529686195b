"""Metrics of a run: gathered on the device, read once in a while, written as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from adamae_sampler import MaskSample
from adamae_sampler.losses import LossOutput

_MEANS = ("loss", "reconstruction", "sampling", "entropy")  # over forward passes
_COUNTS = ("nonfinite_scores", "nonfinite_reconstruction", "nonfinite_sampling")  # over forward passes and processes


class DeviceMetrics:
    """Sums over the steps since the last reading. Adding to them never waits for the device.

    Args:
        num_tokens: N.
        device: where the model is.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.device = device
        self._reset()

    def _reset(self) -> None:
        names = (*_MEANS, *_COUNTS, "grad_norm", "skipped_steps")
        self.sums = {name: torch.zeros((), device=self.device) for name in names}
        self.seen = torch.zeros(self.num_tokens, device=self.device)
        self.forwards = 0
        self.updates = 0
        self.adaptive = True

    @torch.no_grad()
    def add_forward(self, out: LossOutput, sample: MaskSample) -> None:
        """Counts one forward pass."""
        self.forwards += 1
        self.sums["loss"] += out.loss
        self.sums["reconstruction"] += out.reconstruction
        self.sums["sampling"] += out.sampling
        self.sums["nonfinite_reconstruction"] += ~out.reconstruction.isfinite()
        self.sums["nonfinite_sampling"] += ~out.sampling.isfinite()
        if sample.log_probs is not None and sample.num_nonfinite is not None:
            self.sums["entropy"] += torch.special.entr(sample.log_probs.exp()).sum(1).mean()
            self.sums["nonfinite_scores"] += sample.num_nonfinite.sum()
        else:
            self.adaptive = False
        self.seen += (~sample.mask).sum(0)

    @torch.no_grad()
    def add_update(self, grad_norm: Tensor) -> None:
        """Counts one optimiser step, which is skipped if the norm of its gradient is not finite."""
        self.updates += 1
        self.sums["grad_norm"] += grad_norm
        self.sums["skipped_steps"] += ~grad_norm.isfinite()

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means and counts since the last reading, over all processes; None for a mean that is not finite, and for
        `sampling` and `entropy` of masks without a p.

        `coverage` is the share of the N token positions that were visible at least once; `entropy` is that of p in
        nats, log N for a uniform p.
        """
        totals = accelerator.reduce(torch.stack(list(self.sums.values())), "mean").tolist()
        seen: Tensor = accelerator.reduce(self.seen, "sum")
        total = dict(zip(self.sums, totals, strict=True))
        values: dict[str, float | None] = {name: total[name] / max(self.forwards, 1) for name in _MEANS}
        values["grad_norm"] = total["grad_norm"] / max(self.updates, 1)
        if not self.adaptive:
            values |= {"sampling": None, "entropy": None}
        values = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        values["coverage"] = float((seen > 0).float().mean())
        values |= {name: round(total[name] * accelerator.num_processes) for name in _COUNTS}
        values["skipped_steps"] = round(total["skipped_steps"])  # the same on every process
        self._reset()
        return values


class RunLog:
    """metrics.jsonl and TensorBoard files in a folder; nothing where `enabled` is False (other ranks).

    A resumed run appends; lines of steps that it repeats are dropped first.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= first_step] if first_step else []
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self.path)
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines so far; a killed run may have left half a line at the end."""
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, one point in each plot."""
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.board.close()
