"""Metrics of a run: gathered on the device, read once in a while, written as JSON lines and for TensorBoard."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from adamae_sampler import MaskSample
from adamae_sampler.losses import LossOutput
from common.files import append_whole


class DeviceMetrics:
    """Sums over the steps since the last reading, in the same tensors throughout, since a CUDA graph adds to them where
    they were. Adding to them never waits for the device.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in_a_row = torch.zeros((), device=device)  # steps that were skipped, up to the last
        self._means: dict[str, list[Tensor]] = {}  # the sum, and how many it is of
        self._counts: dict[str, Tensor] = {}
        self.mean("grad_norm", torch.zeros((), device=self.device), times=0)

    @torch.no_grad()
    def mean(self, name: str, value: Tensor, times: int = 1) -> None:
        """Adds a scalar to what a mean is taken of."""
        entry = self._means.setdefault(name, [torch.zeros((), device=self.device) for _ in range(2)])
        entry[0] += value
        entry[1] += times

    @torch.no_grad()
    def count(self, name: str, value: Tensor) -> None:
        """Adds a scalar to a count over all processes."""
        total = self._counts.setdefault(name, torch.zeros((), device=self.device))
        total += value

    def add_loss(self, name: str, value: Tensor) -> None:
        """A mean, and the count `nonfinite_<name>`."""
        self.mean(name, value.detach())
        self.count(f"nonfinite_{name}", ~value.detach().isfinite())

    @torch.no_grad()
    def add_update(self, grad_norm: Tensor, accelerator: Accelerator) -> None:
        """Counts one optimiser step, which is skipped if the norm of its gradient is not finite."""
        self.mean("grad_norm", grad_norm)
        skipped = ~grad_norm.isfinite()
        self._in_a_row.add_(1).mul_(skipped)
        # The norm is the same on every process: the main one counts for all.
        self.count("skipped_steps", skipped if accelerator.is_main_process else torch.zeros_like(skipped))

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means and counts since the last reading, over all processes; None for a mean that is not finite.

        `nonfinite_in_a_row` is how many steps up to the last were skipped, however long ago that began.
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
        """What was added since the last reading, over all processes, for a checkpoint; all have to call this."""
        sums = {f"mean {name}": torch.stack(entry) for name, entry in self._means.items()}
        sums |= {f"count {name}": total.clone() for name, total in self._counts.items()}
        sums["in a row"] = self._in_a_row * accelerator.is_main_process
        return {name: accelerator.reduce(total, "sum") for name, total in sums.items()}

    def restore(self, state: Mapping[str, Tensor], accelerator: Accelerator) -> None:
        """Puts back what was added; the main process has it for all."""
        mine = {name: total.to(self.device) * accelerator.is_main_process for name, total in state.items()}
        self._in_a_row = state["in a row"].to(self.device)
        for name, total in mine.items():
            kind, _, name = name.partition(" ")
            if kind == "mean":
                self._means[name] = list(total.unbind())
            elif kind == "count":
                self._counts[name] = total


class PretrainMetrics(DeviceMetrics):
    """What is worth watching in pre-training: both losses, the entropy of p in nats (log N for a uniform p), and
    `coverage`, the share of the N token positions that were visible at least once.

    Args:
        num_tokens: N.
        device: where the model is.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        super().__init__(device)
        self.seen = torch.zeros(num_tokens, device=device)
        self.adaptive = True

    @torch.no_grad()
    def add_forward(self, out: LossOutput, sample: MaskSample) -> None:
        """Counts one forward pass."""
        self.mean("loss", out.loss)
        self.add_loss("reconstruction", out.reconstruction)
        self.add_loss("sampling", out.sampling)
        if sample.log_probs is not None and sample.num_nonfinite is not None:
            self.mean("entropy", torch.special.entr(sample.log_probs.exp()).sum(1).mean())
            self.count("nonfinite_scores", sample.num_nonfinite.sum())
        else:
            self.adaptive = False
        self.seen += (~sample.mask).sum(0)

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """As `DeviceMetrics.read`, with `coverage`; None for `sampling` and `entropy` of masks without a p."""
        seen: Tensor = accelerator.reduce(self.seen, "sum")
        values = super().read(accelerator)
        if not self.adaptive:
            values |= {"sampling": None, "entropy": None, "nonfinite_scores": 0}
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


class RunLog:
    """metrics.jsonl and TensorBoard files in a folder, and Accelerate's trackers; nothing where `enabled` is False
    (other ranks).

    A resumed run appends; lines of steps that it repeats are dropped first.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool, trackers: Sequence[GeneralTracker] = ()) -> None:
        self.enabled = enabled
        self.trackers = trackers
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if line["step"] <= first_step] if first_step else []
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self.path)
        self._unwritten = ""
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines so far; a killed run may have left half a line at the end."""
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, one point in each plot. What a full disk does not take is written with the next line."""
        if not self.enabled:
            return
        for tracker in self.trackers:
            tracker.log({name: value for name, value in values.items() if value is not None}, step=step)
        self._unwritten += json.dumps({"step": step, **values}) + "\n"
        try:
            append_whole(self.path, self._unwritten)
            self._unwritten = ""
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)
        except OSError as error:
            tqdm.write(f"metrics of step {step} could not be written ({error})")

    def summarise(self, path: Path) -> None:
        """Writes and prints the run in a few lines: first and last losses, pace, skipped steps."""
        lines = [line for line in self._lines() if "step_time" in line]
        first, last = lines[0], lines[-1]
        middle = {
            name: statistics.median(values)
            for name in ("step_time", "data_time", "clips_per_second", "tflops", "mfu")
            if (values := [line[name] for line in lines if line.get(name) is not None])
        }
        losses = ("loss", "reconstruction", "sampling", "entropy")
        text = [f"{last['step']} steps, {last['epoch']:.1f} epochs"]
        text += [
            f"{name}: {first[name]:.4g} at step {first['step']}, {last[name]:.4g} at the end"
            for name in losses
            if first.get(name) is not None and last.get(name) is not None
        ]
        text += [f"{name}: {value:.4g} (median)" for name, value in middle.items()]
        text += [f"memory: {max(line['memory_gib'] for line in lines):.3g} GiB at most"]
        text += [f"skipped steps: {sum(line['skipped_steps'] for line in lines)}"]
        path.write_text("\n".join(text) + "\n")
        tqdm.write("\n".join(f"  {line}" for line in text))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.board.close()
