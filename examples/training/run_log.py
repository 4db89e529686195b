"""The record of a run: lines of metrics, plots, trackers, a summary, the progress bar, and a profile."""

from __future__ import annotations

import importlib
import json
import statistics
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.atomic_files import append_whole
from training.interrupts import TrainingError
from training.recipe import Recipe

_ON_PROGRESS_BAR = {
    "loss": "loss",
    "rec": "reconstruction",
    "samp": "sampling",
    "entropy": "entropy",
    "cover": "coverage",
    "data": "data_time",
}


class RunLog:
    """metrics.jsonl, TensorBoard files and the trackers of a run. A resumed run appends. It first drops the lines of
    the steps that it repeats.

    Args:
        folder: output folder of the run.
        first_step: number of steps done before.
        enabled: whether to write; True only on the main process.
        trackers: Accelerate's trackers.
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
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8", newline="\n")
        aside.replace(self.path)
        self._unwritten = ""
        self.board = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines so far. A killed run may have left half a line at the end."""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with suppress(json.JSONDecodeError):
                yield json.loads(line)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line, and one point in each plot. If the disk is full, the next call tries the line again."""
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

    def write_picture(self, step: int, pixels: Tensor) -> None:
        """Writes a picture [H, W, 3] uint8 to TensorBoard and the trackers."""
        if not self.enabled:
            return
        for tracker in self.trackers:  # wandb or trackio
            image = importlib.import_module(tracker.name).Image(pixels.numpy())
            tracker.log({"overview": image}, step=step)
        try:
            self.board.add_image("overview", pixels, step, dataformats="HWC")
        except OSError as error:
            tqdm.write(f"the picture of step {step} could not be written ({error})")

    def summarise(self, path: Path) -> None:
        """Writes and prints a summary of the run: first and last losses, pace, skipped steps."""
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
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        tqdm.write("\n".join(f"  {line}" for line in text))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.board.close()


def begin_tracking(recipe: Recipe, accelerator: Accelerator) -> None:
    """Opens the run in --tracker, or resumes it there. tracker.txt in the output folder keeps the name of the run.

    Raises:
        TrainingError: the tracker cannot be reached, or has no key.
    """
    if recipe.tracker is None:
        return
    path, name = recipe.output / "tracker.txt", ""
    if accelerator.is_main_process:
        name = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        name = name or f"{recipe.output.name}-{uuid.uuid4().hex[:8]}"
        path.write_text(f"{name}\n", encoding="utf-8")
    of_tracker = {
        "wandb": {"id": name, "name": name, "resume": "allow", "dir": recipe.output},
        "trackio": {"name": name, "resume": "allow"},
    }
    try:
        accelerator.init_trackers("adamae_sampler", recipe.plain(), of_tracker)  # only the main process sends
    except Exception as error:  # trackers raise errors of their own; usual causes are a missing key or network
        raise TrainingError(f"--tracker {recipe.tracker}: {error}. Use --tracker None to run without it.") from error


def profiler(recipe: Recipe, is_main: bool) -> AbstractContextManager[Any]:
    """A context that traces steps 4 to 6 on the main process with --profile, and else gives None."""
    if not (recipe.profile and is_main):
        return nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=2, wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(recipe.output / "profile")),
        record_shapes=True,
    )


def progress_values(values: Mapping[str, float | None]) -> dict[str, str]:
    """The metrics that the progress bar shows, as text."""
    return {
        short: f"{value:.3g}" for short, name in _ON_PROGRESS_BAR.items() if (value := values.get(name)) is not None
    }


def warn_about_nonfinite(step: int, values: Mapping[str, float | None]) -> None:
    """Prints how many values were not finite, and steps skipped, since the last line of metrics."""
    names = [name for name in values if name.startswith("nonfinite_") or name == "skipped_steps"]
    if any(values[name] for name in names):
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {values[name]:g}" for name in names))
