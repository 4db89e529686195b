"""Metrics of a run: summed on the device in each step, read every few steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from adamae_sampler import MaskSample
from adamae_sampler.losses import LossOutput


class DeviceMetrics:
    """Sums over the steps since the last reading. Adding to them never waits for the device.

    The sums stay the same tensors, since a CUDA graph adds to the memory that it captured.

    Args:
        device: the device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in_a_row = torch.zeros((), device=device)  # skipped steps up to now, without a gap
        self._means: dict[str, list[Tensor]] = {}  # sum and number of summands
        self._counts: dict[str, Tensor] = {}
        self.mean("grad_norm", torch.zeros((), device=self.device), times=0)

    @torch.no_grad()
    def mean(self, name: str, value: Tensor, times: int = 1) -> None:
        """Adds a scalar to a mean."""
        entry = self._means.setdefault(name, [torch.zeros((), device=self.device) for _ in range(2)])
        entry[0] += value
        entry[1] += times

    @torch.no_grad()
    def count(self, name: str, value: Tensor) -> None:
        """Adds a scalar to a count over all processes."""
        total = self._counts.setdefault(name, torch.zeros((), device=self.device))
        total += value

    def add_loss(self, name: str, value: Tensor) -> None:
        """Adds a scalar to a mean, and to the count `nonfinite_<name>` if it is not finite."""
        self.mean(name, value.detach())
        self.count(f"nonfinite_{name}", ~value.detach().isfinite())

    @torch.no_grad()
    def add_update(self, grad_norm: Tensor, accelerator: Accelerator) -> None:
        """Counts one optimiser step. A nonfinite gradient norm counts as a skipped step."""
        self.mean("grad_norm", grad_norm)
        skipped = ~grad_norm.isfinite()
        self._in_a_row.add_(1).mul_(skipped)
        # The norm is the same on every process, so only the main process counts.
        self.count("skipped_steps", skipped if accelerator.is_main_process else torch.zeros_like(skipped))

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means and counts since the last reading, over all processes; None for a mean that is not finite.

        `nonfinite_in_a_row` is the number of skipped steps up to now without a gap, also from before the last reading.
        """
        in_a_row = self._in_a_row * accelerator.is_main_process
        sums = [*itertools.chain.from_iterable(self._means.values()), *self._counts.values()]
        *totals, skipped = accelerator.reduce(torch.stack([*sums, in_a_row]), "sum").tolist()
        values: dict[str, float | None] = {}
        for number, name in enumerate(self._means):
            total, times = totals[2 * number : 2 * number + 2]
            mean = total / max(times, 1)
            values[name] = mean if math.isfinite(mean) else None
        values |= {name: round(total) for name, total in zip(self._counts, totals[2 * len(self._means) :], strict=True)}
        values["nonfinite_in_a_row"] = round(skipped)
        for total in sums:
            total.zero_()
        return values

    def state(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The sums since the last reading, over all processes, for a checkpoint; all processes call this."""
        sums = {f"mean {name}": torch.stack(entry) for name, entry in self._means.items()}
        sums |= {f"count {name}": total.clone() for name, total in self._counts.items()}
        sums["in a row"] = self._in_a_row * accelerator.is_main_process
        return {name: accelerator.reduce(total, "sum") for name, total in sums.items()}

    def restore(self, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Restores the sums. The main process holds the sums of all processes."""
        mine = {name: total.to(self.device) * accelerator.is_main_process for name, total in state.items()}
        self._in_a_row = state["in a row"].to(self.device)
        for name, total in mine.items():
            kind, _, name = name.partition(" ")
            if kind == "mean":
                self._means[name] = list(total.unbind())
            elif kind == "count":
                self._counts[name] = total


class PretrainMetrics(DeviceMetrics):
    """Metrics of pre-training: both losses, entropy and coverage.

    `sampling` is the loss of the sampler: the sampling loss, or the ranking loss of hard masking. `entropy` is that of
    a learned p in nats; a uniform p has log N. `coverage` is the share of the N token positions that were visible at
    least once.

    Args:
        num_tokens: N.
        device: the device of the model.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        super().__init__(device)
        self.seen = torch.zeros(num_tokens, device=device)
        self.learned = self.has_p = True

    @torch.no_grad()
    def add_forward(self, out: LossOutput, sample: MaskSample) -> None:
        """Counts one forward pass."""
        self.mean("loss", out.loss)
        self.add_loss("reconstruction", out.reconstruction)
        self.add_loss("sampling", out.sampling)
        if sample.num_nonfinite is not None:
            self.count("nonfinite_scores", sample.num_nonfinite.sum())
        self.has_p = sample.log_probs is not None
        self.learned = self.has_p or sample.difficulty is not None
        if sample.log_probs is not None:
            self.mean("entropy", torch.special.entr(sample.log_probs.exp()).sum(1).mean())
        self.seen += (~sample.mask).sum(0)

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """As `DeviceMetrics.read`, with `coverage`. `sampling` is None if nothing is learned, `entropy` if no p is."""
        seen: Tensor = accelerator.reduce(self.seen, "sum")
        values = super().read(accelerator)
        values.setdefault("nonfinite_scores", 0)
        values |= {} if self.learned else {"sampling": None}
        values |= {} if self.has_p else {"entropy": None}
        values["coverage"] = float((seen > 0).float().mean())
        self.seen.zero_()
        return values

    def state(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """As `DeviceMetrics.state`."""
        return {**super().state(accelerator), "seen": accelerator.reduce(self.seen.clone(), "sum")}

    def restore(self, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """As `DeviceMetrics.restore`."""
        super().restore(state, accelerator)
        self.seen = state["seen"].to(self.device) * accelerator.is_main_process
