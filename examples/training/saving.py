"""Saving a run while it trains, and ending a run that cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from common.atomic_files import replacing
from training.broken_videos import BrokenVideos
from training.checkpoints import CHECKPOINTS, Checkpoints
from training.interrupts import TrainingError
from training.job import Job
from training.metrics import DeviceMetrics
from training.resume import make_state
from video_data.clips import ClipStream


@dataclass
class Saver:
    """Writes the checkpoints of a run. All processes call its methods.

    Attributes:
        job: the run.
        model: prepared.
        optimizer: prepared.
        stream: the clips of the run.
        broken_videos: the broken videos that were found so far.
        metrics: the sums since the last line of metrics.
        better: name of the metric that ranks checkpoints, and 1 if a larger one is better, else -1.
        extra: further entries of a checkpoint.
    """

    job: Job[Any, Any]
    model: nn.Module
    optimizer: Any
    stream: ClipStream
    broken_videos: BrokenVideos
    metrics: DeviceMetrics
    better: tuple[str, int]
    extra: Callable[[], Mapping[str, Any]]

    def save(self, done: int, measured: Mapping[str, float | None], must: bool) -> str:
        """Writes a checkpoint and returns its name. A failure ends the run if `must`; else it is printed.

        Args:
            done: number of steps done.
            measured: metrics of this step; one of them ranks the checkpoint.
            must: whether a failure ends the run.

        Raises:
            TrainingError: a checkpoint that must be written cannot be, or too many videos are broken.
        """
        too_many = self.broken_videos.exchange()
        saved = self._write(done, measured, must or too_many is not None)
        if too_many is not None:
            raise TrainingError(f"{too_many} The run is saved in {saved}.")
        return saved

    def _write(self, done: int, measured: Mapping[str, float | None], must: bool) -> str:
        recipe, accelerator = self.job.recipe, self.job.accelerator
        name, sign = self.better
        value = measured.get(name)
        more = {
            "step": done,
            "score": None if value is None else sign * value,
            "videos": self.stream.digest,
            "metrics": self.metrics.state(accelerator),
            "extra": dict(self.extra()),
        }
        state = make_state(accelerator, self.model, self.optimizer, recipe, self.job.schedule, more)
        outcome = [True, ""]
        if state is not None:
            checkpoints = Checkpoints(recipe.output / CHECKPOINTS, recipe.keep_checkpoints)
            try:
                outcome = [True, str(checkpoints.save(state))]
            except OSError as error:
                newest, _ = checkpoints.newest(recipe.kind)
                problem = f"step {done} could not be saved ({error}); the newest checkpoint is {newest}"
                outcome = [False, problem]
        written, text = broadcast_object_list([outcome])[0]
        if not written and must:
            raise TrainingError(text)
        if not written and accelerator.is_main_process:
            tqdm.write(f"{text}. Training goes on.")
        return str(text)

    def check(self, done: int, values: Mapping[str, float | None]) -> None:
        """Saves and ends the run if too many steps in a row were skipped, or too many videos are broken.

        Args:
            done: number of steps done.
            values: the line of metrics of this step.

        Raises:
            TrainingError: the run cannot go on. The message says why, and names the checkpoint.
        """
        recipe = self.job.recipe
        in_a_row = round(values["nonfinite_in_a_row"] or 0)
        if in_a_row >= recipe.stop_after_nonfinite:
            report = recipe.output / "nonfinite.txt"
            if self.job.accelerator.is_main_process:
                videos = self.job.schedule.effective_batch
                lines = [
                    f"step {step + 1}: {', '.join(self.stream.names(step * videos, (step + 1) * videos))}"
                    for step in range(done - in_a_row, done)
                ]
                terms = ", ".join(
                    f"{name} {value:g}" for name, value in values.items() if "nonfinite" in name and value
                )
                with replacing(report) as aside:
                    aside.write_text("\n".join([terms, *lines]) + "\n", encoding="utf-8")
            saved = self.save(done, values, must=True)
            raise TrainingError(
                f"the last {in_a_row} steps had a loss or gradient that is not finite and were skipped; "
                f"stop_after_nonfinite={recipe.stop_after_nonfinite}. {report} lists their videos. The run is saved in "
                f"{saved}. Try a lower --base-lr, --precision fp32 or --clip-grad."
            )
        if self.broken_videos.exchange() is not None:
            self.save(done, values, must=True)
