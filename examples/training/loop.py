"""The training loop of pre-training and fine-tuning.

`clip_loader` (video_data/clips.py) gives batches. `TrainingLoop.run` takes the batches of a step. `_update` passes each
batch to the script's `forward`, which returns the loss, and calls the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from adamae_sampler.attention import prefer_cudnn
from common.atomic_files import replacing
from common.devices import autocast, compile_blocks, deepspeed_config, uses_deepspeed
from training.broken_videos import BrokenVideos
from training.checkpoints import CHECKPOINTS, Checkpoints
from training.cuda_graph import GraphedUpdate, Part, Update, make_capturable, set_learning_rates
from training.interrupts import Interrupted, Interrupts, Request, TrainingError
from training.job import Job
from training.metrics import DeviceMetrics
from training.recipe import Recipe
from training.resume import Resumed, restore, restore_random_state, set_aside
from training.run_log import RunLog, begin_tracking, profiler, progress_values, warn_about_nonfinite
from training.saving import Saver
from training.schedule import Schedule
from training.throughput import Clock, memory_gib, utilisation
from video_data.clips import ClipStream, clip_loader
from video_data.reader_processes import read_batches

Forward = Callable[[dict[str, Any], int], Tensor]


class TrainingLoop:
    """Optimiser steps with accumulated gradients, metrics and checkpoints.

    The constructor prepares the output folder, the position in the data, the model and the optimiser, for a new or a
    resumed run.

    Attributes:
        model: prepared.
        broken_videos: the videos that could not be used.

    Args:
        job: the run.
        optimizer: a fused AdamW; the learning rate of a group is multiplied by its `lr_scale`, if it has one.
        better: name of the metric that ranks checkpoints, and 1 if a larger one is better, else -1.

    Raises:
        TrainingError: processes see different checkpoints, or the tracker does not start.
    """

    def __init__(self, job: Job[Any, Any], optimizer: torch.optim.Optimizer, better: tuple[str, int]) -> None:
        recipe, accelerator, schedule, resumed = job.recipe, job.accelerator, job.schedule, job.resumed
        _check_same_start(resumed)
        if accelerator.is_main_process:
            _prepare_output(recipe, resumed)
        accelerator.wait_for_everyone()
        begin_tracking(recipe, accelerator)
        self.job = job
        self.better = better
        self.broken_videos = BrokenVideos(
            recipe.output / "quarantine.txt", job.source, recipe.max_broken, writes=accelerator.is_main_process
        )
        self._first_step = resumed.state["step"] if resumed else 0
        start, stop = (step * schedule.effective_batch for step in (self._first_step, schedule.steps))
        self._stream = ClipStream(job.source, start, stop, recipe.seed, self.broken_videos.known)
        batches = clip_loader(self._stream, recipe.batch_size, recipe.readers)
        _configure_accumulation(accelerator, recipe, schedule)
        if recipe.compile == "blocks":
            compile_blocks(job.model)
        self.model, self._optimizer, self._batches = accelerator.prepare(job.model, optimizer, batches)
        if resumed:
            restore(resumed.state, accelerator, self.model, self._optimizer)
        set_seed(recipe.seed, device_specific=True)  # from here on, masks and dropout differ between processes
        if resumed:
            restore_random_state(resumed.state, accelerator)

    def run(
        self,
        forward: Forward,
        metrics: DeviceMetrics,
        flops_of_clip: float,
        evaluate: Callable[[int], dict[str, float]] = lambda _: {},
        extra: Callable[[], Mapping[str, Any]] = dict,
        picture: Callable[[int], Tensor | None] = lambda _: None,
        graph: bool = False,
    ) -> None:
        """Trains to the last step.

        Args:
            forward: returns the loss of a batch, given the batch and its number in the run on this process.
            metrics: the sums that `forward` adds to.
            flops_of_clip: floating-point operations of a forward pass of one clip.
            evaluate: called after each step with the number of steps done; returns metrics to log, or an empty dict.
            extra: returns further entries of a checkpoint.
            picture: called likewise; returns a picture [H, W, 3] uint8 to log, or None.
            graph: whether steps run as a CUDA graph; `forward` then ignores the number of a batch.

        Raises:
            Interrupted: a signal stopped the run, and the run is saved.
            TrainingError: the run cannot go on, or too many videos are broken.
            VideoError: many videos in a row could not be read.
        """
        recipe, schedule, accelerator = self.job.recipe, self.job.schedule, self.job.accelerator
        is_main, first = accelerator.is_main_process, self._first_step
        saver = Saver(
            self.job, self.model, self._optimizer, self._stream, self.broken_videos, metrics, self.better, extra
        )
        update: Update = partial(self._update, forward=forward, metrics=metrics)
        update = GraphedUpdate(update) if graph else update
        make_capturable(self._optimizer, accelerator.device, graph)
        clock = Clock(schedule.effective_batch * recipe.repeats, first)
        with (
            prefer_cudnn(),
            Interrupts(recipe.save_minutes) as interrupts,
            RunLog(recipe.output, first, is_main, accelerator.trackers) as log,
            closing(read_batches(self._batches, recipe.readers)) as batches,
            profiler(recipe, is_main) as profile,
            tqdm(total=schedule.steps, initial=first, disable=not is_main, unit="step", file=sys.stdout) as progress,
        ):
            self.model.train()
            if self.job.resumed:
                metrics.restore(self.job.resumed.state["metrics"], accelerator)
            for step in range(first, schedule.steps):
                set_learning_rates(self._optimizer, schedule.lr_at(step))
                update(self._parts(step, batches, clock))
                progress.update()
                if profile is not None:
                    profile.step()
                done = step + 1
                last = done == schedule.steps
                measured: dict[str, float | None] = {}  # metrics of this step
                if done % recipe.log_every == 0 or last:
                    measured |= metrics.read(accelerator)
                    measured |= {"lr": schedule.lr_at(step), "epoch": done * schedule.effective_batch / schedule.clips}
                    measured |= self._costs(clock.read(done), flops_of_clip)
                    log.write(done, measured)
                    progress.set_postfix(progress_values(measured))
                    warn_about_nonfinite(done, measured)
                    saver.check(done, measured)
                request = interrupts.after_step()
                if request is Request.STOP and not last:  # at once: a scheduler gives little time
                    saved = saver.save(done, measured, must=True)
                    if is_main:
                        tqdm.write(f"stopped after step {done} by a signal; go on with --resume {saved}")
                    raise Interrupted
                with clock.paused():
                    if evaluated := evaluate(done):
                        log.write(done, evaluated)
                        measured |= evaluated
                    if (pixels := picture(done)) is not None:
                        log.write_picture(done, pixels)
                    if request is Request.SAVE or done % recipe.save_every == 0 or last or evaluated:
                        saver.save(done, measured, must=last)
                        interrupts.saved()
            if is_main and first < schedule.steps:
                log.summarise(recipe.output / "summary.txt")

    def _parts(self, step: int, batches: Iterator[dict[str, Any]], clock: Clock) -> Iterator[Part]:
        """Yields the batches of a step, each with its number in the run on this process."""
        for part in range(self.job.schedule.accumulation):
            with clock.waiting_for_data():
                batch = next(batches)
            self.broken_videos.add(batch.pop("left_out"))
            yield batch, step * self.job.schedule.accumulation + part

    def _update(self, parts: Iterable[Part], forward: Forward, metrics: DeviceMetrics) -> None:
        """One optimiser step. A nonfinite gradient leaves the weights as they are; nothing waits for the device."""
        accelerator = self.job.accelerator
        for batch, number in parts:
            with accelerator.accumulate(self.model):  # gradients are reduced once a step
                with autocast(accelerator):
                    loss = forward(batch, number)
                accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.job.recipe.clip_grad or torch.inf)
        if uses_deepspeed(accelerator):  # its last backward pass made the step, if the norm was finite
            grad_norm = torch.tensor(grad_norm, device=accelerator.device)
        else:
            grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
            # The fused kernel skips its step where this is 1. In fp16 the scaler does the same.
            self._optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
        self._optimizer.step()
        self._optimizer.zero_grad()
        metrics.add_update(grad_norm, accelerator)

    def _costs(self, pace: dict[str, float | None], flops_of_clip: float) -> dict[str, float | None]:
        """Pace, utilisation, and the memory of this process's device."""
        accelerator = self.job.accelerator
        clips_per_second = pace["clips_per_second"] or 0.0
        used = utilisation(flops_of_clip, clips_per_second, accelerator.num_processes, accelerator.device)
        return {**pace, **used, "memory_gib": memory_gib(accelerator.device)}


def _check_same_start(resumed: Resumed | None) -> None:
    """Raises TrainingError if the processes see different checkpoints."""
    starts = gather_object([(resumed.path.name, resumed.state["step"]) if resumed else ("none", 0)])
    if len(set(starts)) > 1:
        raise TrainingError(f"the processes see different checkpoints: {starts}; --output must be a shared folder.")


def _prepare_output(recipe: Recipe, resumed: Resumed | None) -> None:
    """Writes recipe.yaml. Sets aside an earlier run in the output folder, or, if resumed, its later checkpoints."""
    if resumed and resumed.path.resolve().parents[1] == recipe.output.resolve():
        Checkpoints(recipe.output / CHECKPOINTS).begin(resumed.state["step"])
    elif earlier := set_aside(recipe.output):
        print(f"{'set aside':>13}  the earlier run is now {earlier}")
    with replacing(recipe.output / "recipe.yaml") as aside:
        aside.write_text(yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _configure_accumulation(accelerator: Accelerator, recipe: Recipe, schedule: Schedule) -> None:
    """Tells Accelerate and DeepSpeed over how many batches gradients are accumulated."""
    accelerator.gradient_accumulation_steps = schedule.accumulation
    # Without this, FSDP2 keeps unsharded gradients on every device until the last part.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = accelerator.distributed_type == "FSDP"
    if uses_deepspeed(accelerator):  # its engine accumulates and clips
        of_engine = {"gradient_accumulation_steps": schedule.accumulation, "gradient_clipping": recipe.clip_grad}
        deepspeed_config(accelerator).update(of_engine)
