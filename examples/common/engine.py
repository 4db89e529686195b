"""The training loop that pre-training and fine-tuning share: steps, metrics, checkpoints, and what ends it early."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from adamae_sampler.attention import prefer_cudnn
from common.costs import Clock, memory_gib, utilisation
from common.datasets import ClipSource, ClipStream, collate_clips, digest
from common.devices import autocast, compile_blocks, deepspeed_config, uses_deepspeed
from common.endings import TrainingError
from common.files import replacing
from common.graphs import GraphedUpdate, Part, Update, make_capturable, set_learning_rates
from common.interrupts import READERS, Interrupted, Interrupts, Request
from common.metrics import DeviceMetrics, RunLog
from common.quarantine import Quarantine
from common.recipe import Recipe, Schedule
from common.state import (
    CHECKPOINTS,
    Checkpoints,
    describe_resumption,
    load_state,
    make_state,
    restore,
    restore_random_state,
    set_aside,
)

_SHOWN = {
    "loss": "loss",
    "rec": "reconstruction",
    "samp": "sampling",
    "entropy": "entropy",
    "cover": "coverage",
    "data": "data_time",
}  # fmt: skip - metrics on the progress bar


class Resumed(NamedTuple):
    """What a run goes on from."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def load(cls, path: Path | None, recipe: Recipe, schedule: Schedule, source: ClipSource) -> Resumed | None:
        """What --resume names; raises ValueError or FileNotFoundError if this run cannot go on from it."""
        return None if path is None else cls(path, load_state(path, recipe, schedule, digest(source)))

    def describe(self, accelerator: Accelerator, recipe: Recipe) -> str:
        """A line for people."""
        return f"{'resumes':>13}  {describe_resumption(self.path, self.state, accelerator, recipe.batch_size)}"


@dataclass
class Loop:
    """Optimiser steps with accumulated gradients, metrics and checkpoints.

    Attributes:
        recipe: the settings.
        schedule: what follows from them.
        accelerator: devices and processes.
        model: prepared.
        optimizer: a fused AdamW, prepared; a group's learning rate is scaled by its `lr_scale`, if it has one.
        stream: the clips of the run from its first step on.
        batches: of them, prepared.
        first_step: how many steps were done before.
        quarantine: videos that cannot be used.
        better: name of the metric by which a checkpoint is the best, and 1 if a larger one is better, else -1.
        resumed: what the run goes on from.
    """

    recipe: Recipe
    schedule: Schedule
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    stream: ClipStream
    batches: DataLoader
    first_step: int
    quarantine: Quarantine
    better: tuple[str, int]
    resumed: Resumed | None

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        schedule: Schedule,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        source: ClipSource,
        resumed: Resumed | None,
        better: tuple[str, int],
    ) -> Loop:
        """Makes the folder ready, the data start where they should, and model and optimiser what they were.

        Raises:
            TrainingError: the processes would go on from different checkpoints.
        """
        starts = gather_object([(resumed.path.name, resumed.state["step"]) if resumed else ("none", 0)])
        if len(set(starts)) > 1:
            raise TrainingError(f"the processes see different checkpoints, {starts}; --output must be a shared folder.")
        if accelerator.is_main_process:
            in_place = resumed is not None and resumed.path.resolve().parents[1] == recipe.output.resolve()
            if resumed and in_place:
                Checkpoints(recipe.output / CHECKPOINTS).begin(resumed.state["step"])
            elif earlier := set_aside(recipe.output):
                print(f"{'set aside':>13}  the earlier run is now {earlier}")
            with replacing(recipe.output / "recipe.yaml") as aside:
                aside.write_text(yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        accelerator.wait_for_everyone()
        _begin_tracking(recipe, accelerator)
        is_main = accelerator.is_main_process
        quarantine = Quarantine(recipe.output / "quarantine.txt", source, recipe.max_broken, writes=is_main)
        first_step = resumed.state["step"] if resumed else 0
        videos = schedule.effective_batch
        stream = ClipStream(source, first_step * videos, schedule.steps * videos, recipe.seed, quarantine.known)
        accelerator.gradient_accumulation_steps = schedule.accumulation
        # Else FSDP2 would keep the whole gradients of all parts but the last on every device.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = accelerator.distributed_type == "FSDP"
        if uses_deepspeed(accelerator):  # its engine accumulates and clips
            of_engine = {"gradient_accumulation_steps": schedule.accumulation, "gradient_clipping": recipe.clip_grad}
            deepspeed_config(accelerator).update(of_engine)
        if recipe.compile == "blocks":
            compile_blocks(model)
        model, prepared, batches = accelerator.prepare(model, optimizer, _loader(stream, recipe))
        if resumed:
            restore(resumed.state, accelerator, model, prepared)
        set_seed(recipe.seed, device_specific=True)  # from here on, other masks and dropout on every process
        if resumed:
            restore_random_state(resumed.state, accelerator)
        return cls(
            recipe, schedule, accelerator, model, prepared, stream, batches, first_step, quarantine, better, resumed
        )

    def run(
        self,
        forward: Callable[[dict[str, Any], int], Tensor],
        metrics: DeviceMetrics,
        flops_of_clip: float,
        evaluate: Callable[[int], dict[str, float]] = lambda _: {},
        extra: Callable[[], Mapping[str, Any]] = dict,
        graph: bool = False,
    ) -> None:
        """Trains to the end.

        Args:
            forward: from a batch and its number in the run on this process to the loss.
            metrics: what the forward pass adds to.
            flops_of_clip: floating-point operations of a forward pass of one clip.
            evaluate: called with the number of steps done, after each; what it returns is logged.
            extra: what the script wants in a checkpoint.
            graph: run steps as a CUDA graph; `forward` then takes no notice of a batch's number.

        Raises:
            Interrupted: the run was told to stop, and is saved.
            TrainingError: it cannot go on.
            VideoError: too many videos cannot be used.
        """
        recipe, schedule, accelerator = self.recipe, self.schedule, self.accelerator
        is_main, first = accelerator.is_main_process, self.first_step
        progress = tqdm(total=schedule.steps, initial=first, disable=not is_main, unit="step", file=sys.stdout)
        clock = Clock(schedule.effective_batch * recipe.repeats, first)
        update: Update = partial(self._update, forward=forward, metrics=metrics)
        update = GraphedUpdate(update) if graph else update
        make_capturable(self.optimizer, accelerator.device, graph)
        found: dict[str, str] = {}  # broken videos since the last line of metrics

        def save(done: int, measured: Mapping[str, float | None], must: bool) -> str:
            too_many = self.quarantine.add(found)
            found.clear()
            must = must or too_many is not None
            saved = self._save(done, measured.get(self.better[0]), metrics, extra(), must)
            if too_many is not None:
                raise TrainingError(f"{too_many} The state is {saved}.")
            interrupts.saved()
            return saved

        with (
            prefer_cudnn(),
            Interrupts(recipe.save_minutes) as interrupts,
            RunLog(recipe.output, first, is_main, accelerator.trackers) as log,
            closing(_feed(self.batches)) as feed,
            _profiler(recipe, is_main) as profiler,
            progress,
        ):
            self.model.train()
            if self.resumed:
                metrics.restore(self.resumed.state["metrics"], accelerator)
            for step in range(first, schedule.steps):
                set_learning_rates(self.optimizer, schedule.lr_at(step))
                update(self._parts(step, feed, clock, found))
                progress.update()
                if profiler is not None:
                    profiler.step()
                done = step + 1
                last = done == schedule.steps
                measured: dict[str, float | None] = {}  # at this step
                if done % recipe.log_every == 0 or last:
                    values = metrics.read(accelerator)
                    values |= {"lr": schedule.lr_at(step), "epoch": done * schedule.effective_batch / schedule.clips}
                    values |= self._costs(clock.read(done), flops_of_clip)
                    log.write(done, values)
                    measured |= values
                    progress.set_postfix(_summary(values))
                    _warn_about_nonfinite(done, values)
                    self._check_finite(done, values, save)
                    if self.quarantine.add(found) is not None:
                        save(done, measured, True)
                    found.clear()
                request = interrupts.after_step()
                if request is Request.STOP and not last:  # at once: a scheduler gives little time
                    saved = save(done, measured, True)
                    if is_main:
                        tqdm.write(f"stopped after step {done}, as the signal asked; go on with --resume {saved}")
                    raise Interrupted
                with clock.paused():
                    evaluated = evaluate(done)
                    if evaluated:
                        log.write(done, evaluated)
                        measured |= evaluated
                    if request is Request.SAVE or done % recipe.save_every == 0 or last or evaluated:
                        save(done, measured, last)
                if last and is_main:
                    log.summarise(recipe.output / "summary.txt")

    def _parts(self, step: int, feed: Iterator[dict[str, Any]], clock: Clock, found: dict[str, str]) -> Iterator[Part]:
        """The batches of a step, each with its number in the run on this process, as they are read."""
        for part in range(self.schedule.accumulation):
            with clock.waiting_for_data():
                batch = next(feed)
            found |= batch.pop("left_out")
            yield batch, step * self.schedule.accumulation + part

    def _update(
        self, parts: Iterable[Part], forward: Callable[[dict[str, Any], int], Tensor], metrics: DeviceMetrics
    ) -> None:
        """One optimiser step, which a gradient that is not finite leaves without effect. All of it is the device's."""
        accelerator = self.accelerator
        for batch, number in parts:
            with accelerator.accumulate(self.model):  # gradients travel once a step
                with autocast(accelerator):
                    loss = forward(batch, number)
                accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad or torch.inf)
        if uses_deepspeed(accelerator):  # whose engine stepped in the last backward pass, if the norm was finite
            grad_norm = torch.tensor(grad_norm, device=accelerator.device)
        else:
            grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
            # Where this is 1 the fused kernel leaves the weights alone: a bad step is skipped without a wait. In fp16
            # the scaler does the same.
            self.optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics.add_update(grad_norm, accelerator)

    def _costs(self, pace: dict[str, float | None], flops_of_clip: float) -> dict[str, float | None]:
        """Pace, use of the device, and the memory of this process's device."""
        accelerator = self.accelerator
        clips_per_second = pace["clips_per_second"] or 0.0
        used = utilisation(flops_of_clip, clips_per_second, accelerator.num_processes, accelerator.device)
        return {**pace, **used, "memory_gib": memory_gib(accelerator.device)}

    def _save(
        self, done: int, value: float | None, metrics: DeviceMetrics, extra: Mapping[str, Any], must: bool
    ) -> str:
        """Writes a checkpoint and returns its name; where it cannot be written, that is said, and an error on every
        process if it `must` be."""
        more = {
            "step": done,
            "score": None if value is None else self.better[1] * value,
            "videos": self.stream.digest,
            "metrics": metrics.state(self.accelerator),
            "extra": dict(extra),
        }
        state = make_state(self.accelerator, self.model, self.optimizer, self.recipe, self.schedule, more)
        outcome = [True, ""]
        if state is not None:
            checkpoints = Checkpoints(self.recipe.output / CHECKPOINTS, self.recipe.keep_checkpoints)
            try:
                outcome = [True, str(checkpoints.save(state))]
            except OSError as error:
                newest, _ = checkpoints.newest(self.recipe.kind)
                problem = f"step {done} could not be saved ({error}); the newest checkpoint is {newest}"
                outcome = [False, problem]
        written, text = broadcast_object_list([outcome])[0]
        if not written and must:
            raise TrainingError(text)
        if not written and self.accelerator.is_main_process:
            tqdm.write(f"{text}. Training goes on.")
        return str(text)

    def _check_finite(
        self,
        done: int,
        values: Mapping[str, float | None],
        save: Callable[[int, Mapping[str, float | None], bool], str],
    ) -> None:
        """Ends a run whose last steps were all skipped."""
        in_a_row = round(values["nonfinite_in_a_row"] or 0)
        if in_a_row < self.recipe.stop_after_nonfinite:
            return
        report, first = self.recipe.output / "nonfinite.txt", done - in_a_row
        if self.accelerator.is_main_process:
            videos = self.schedule.effective_batch
            lines = [
                f"step {step + 1}: {', '.join(self.stream.names(step * videos, (step + 1) * videos))}"
                for step in range(first, done)
            ]
            terms = ", ".join(f"{name} {value:g}" for name, value in values.items() if "nonfinite" in name and value)
            with replacing(report) as aside:
                aside.write_text("\n".join([terms, *lines]) + "\n", encoding="utf-8")
        saved = save(done, values, True)
        raise TrainingError(
            f"the last {in_a_row} steps had a loss or gradient that is not finite and were skipped, and "
            f"stop_after_nonfinite={self.recipe.stop_after_nonfinite}. Their videos are in {report}, the state is "
            f"{saved}. Try a lower --base-lr, --precision fp32 or --clip-grad."
        )


def _begin_tracking(recipe: Recipe, accelerator: Accelerator) -> None:
    """Opens the run in --tracker, or goes on with it; its name is kept in the output folder."""
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
        accelerator.init_trackers("adamae_sampler", recipe.plain(), of_tracker)  # the main process's alone
    except Exception as error:  # of any kind, the tracker's own; no key and no network are the usual ones
        raise TrainingError(f"--tracker {recipe.tracker}: {error}. Go on without it with --tracker None.") from error


def _loader(stream: ClipStream, recipe: Recipe) -> DataLoader:
    """Batches of the clips, in order of their position."""
    return DataLoader(
        stream,
        batch_size=recipe.batch_size,
        num_workers=recipe.workers,
        collate_fn=collate_clips,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=READERS,
        generator=torch.Generator(),  # its own, so that starting to read spends none of the masks' randomness
    )


def _feed(batches: DataLoader) -> Generator[dict[str, Any], None, None]:
    """The batches; a generator, so that closing it ends the processes that read."""
    yield from batches


def _profiler(recipe: Recipe, is_main: bool) -> AbstractContextManager[Any]:
    """With --profile, a trace of three steps of the main process after three others, for TensorBoard and Perfetto."""
    if not (recipe.profile and is_main):
        return nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(skip_first=2, wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(recipe.output / "profile")),
        record_shapes=True,
    )


def _summary(values: Mapping[str, float | None]) -> dict[str, str]:
    """The metrics for the progress bar."""
    return {short: f"{value:.3g}" for short, name in _SHOWN.items() if (value := values.get(name)) is not None}


def _warn_about_nonfinite(step: int, values: Mapping[str, float | None]) -> None:
    """Prints what was not finite since the last line of metrics."""
    names = [name for name in values if name.startswith("nonfinite_") or name == "skipped_steps"]
    if any(values[name] for name in names):
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {values[name]:g}" for name in names))
