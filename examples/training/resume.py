"""The training state of a run: gathered for a checkpoint, checked and restored when the run resumes.

Weights and optimiser are stored by parameter name, so a run resumes on any number of processes in any wrapper.
"""

from __future__ import annotations

import itertools
import platform
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn

from common.devices import uses_deepspeed
from training.checkpoints import FORMAT, read_header, read_state
from training.full_state import full_state, load_full_state
from training.recipe import AnyRecipe, Recipe, recipe_from
from training.schedule import Schedule
from video_data.clips import ClipSource, digest

# Settings that may change when a run resumes. A change of any other setting is refused.
_FREE = {"output", "steps", "epochs", "workers", "log_every", "batch_size", "compile", "graph"}
_FREE |= {"checkpoint_activations", "fused_head"}  # for a run that ended because memory ran out
_FREE |= {"save_every", "save_minutes", "keep_checkpoints", "stop_after_nonfinite", "max_broken", "profile", "tracker"}
_FREE |= {"picture_every", "eval_every", "eval_batch_size", "test_clips", "test_crops"}
_FREE |= {"effective_batch", "data", "train", "val", "fast"}  # compared by the values that follow from them
_REMOVED = {"head_chunks"}  # settings of earlier versions, without effect on results
_COMPILE = {True: "whole", False: None}  # values of `compile` in earlier versions


class Resumed(NamedTuple):
    """A checkpoint to resume from: path and state."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def load(cls, path: Path | None, recipe: Recipe, schedule: Schedule, source: ClipSource) -> Resumed | None:
        """The checkpoint at `path`, or None if `path` is None. Raises as `load_state`."""
        return None if path is None else cls(path, load_state(path, recipe, schedule, digest(source)))

    def describe(self, accelerator: Accelerator, recipe: Recipe) -> str:
        """The step to resume from, and each difference to an uninterrupted run, on one line."""
        then, now = len(self.state["random_states"]), accelerator.num_processes
        notes = [f"{self.path} from step {self.state['step']}"]
        if then != now:
            notes.append(f"{then} processes before, {now} now: steps have the same videos, but other masks and dropout")
        elif self.state["recipe"]["batch_size"] != recipe.batch_size:
            notes.append("another batch_size: steps have the same videos, but other masks and dropout")
        saved = self.state["versions"]
        notes += [
            f"{name} {saved.get(name)} before, {version} now: results may differ"
            for name, version in versions().items()
            if saved.get(name) != version
        ]
        return "; ".join(notes)


def make_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    recipe: Recipe,
    schedule: Schedule,
    more: Mapping[str, Any],
) -> dict[str, Any] | None:
    """The state that a resumed run needs, on the main process; None on the others. All processes have to call this.

    Args:
        accelerator: devices and processes.
        model: prepared.
        optimizer: prepared.
        recipe: the settings.
        schedule: batches and steps of the run.
        more: entries of the training loop: tensors, numbers, strings and containers of these. "step" is the number of
            steps done, which gives the position in the data. "score" is the quality of the model, or None.
    """
    weights, optimizer_state = full_state(accelerator, model, optimizer)
    random_states = gather_object([_random_state(accelerator.device)])
    if not accelerator.is_main_process:
        return None
    return {
        "format": FORMAT,
        "kind": recipe.kind,
        "recipe": recipe.plain(),
        "clips": schedule.clips,
        "effective_batch": schedule.effective_batch,
        "versions": versions(),
        "random_states": random_states,
        "model": weights,
        "optimizer": optimizer_state,
        "scaler": scaler.state_dict() if (scaler := _scaler(accelerator, optimizer)) is not None else {},
        **more,
    }


def load_state(path: Path, recipe: Recipe, schedule: Schedule, videos: str) -> dict[str, Any]:
    """Reads a checkpoint and checks that this run can continue it.

    Args:
        path: the file.
        recipe: the settings of this run.
        schedule: batches and steps of this run.
        videos: the `digest` of the data set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a whole training state (weights alone cannot be resumed); its recipe, videos or
            effective batch differ; or its step is after the last step of this run.
    """
    tree = read_header(path, recipe.kind)
    saved, now = tree["recipe"], recipe.plain()
    changed = [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    forbidden = [change for change in changed if change.partition(":")[0] not in _FREE]
    for name, then, today in (
        ("number of videos", tree["clips"], schedule.clips),
        ("effective batch", tree["effective_batch"], schedule.effective_batch),
    ):
        if then != today:
            forbidden.append(f"{name}: {then} -> {today}")
    if tree["videos"] != videos and tree["clips"] == schedule.clips:
        forbidden.append("videos: the same number, but other names or another order")
    if forbidden:
        raise ValueError(
            f"{path}: that run had other settings:\n  " + "\n  ".join(forbidden) + "\nPass the same settings, or "
            "start a new run."
        )
    if tree["step"] > schedule.steps:
        raise ValueError(
            f"{path} is at step {tree['step']}, this run ends at {schedule.steps}; raise --steps or --epochs."
        )
    return read_state(path, tree)


def recipe_of_state(kind: type[AnyRecipe], path: Path) -> AnyRecipe:
    """The recipe of a saved run. `output` is the folder where the run is now. The effective batch stays the same for
    any number of devices.

    Raises:
        FileNotFoundError, ValueError: as `load_state`.
    """
    tree = read_header(path, kind.kind)
    now = {"output": str(path.resolve().parent.parent), "effective_batch": tree["effective_batch"]}
    saved = {name: value for name, value in tree["recipe"].items() if name not in _REMOVED}
    saved["compile"] = _COMPILE.get(saved["compile"], saved["compile"])
    return recipe_from(kind, saved | now)


def restore(state: Mapping[str, Any], accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
    """Restores weights, optimiser state and the loss scale of fp16 in a prepared model and optimiser."""
    load_full_state(accelerator, model, optimizer, state["model"], state["optimizer"])
    scaler = _scaler(accelerator, optimizer)
    if scaler is not None and state["scaler"]:  # a checkpoint of another precision has none
        scaler.load_state_dict(state["scaler"])


def _scaler(accelerator: Accelerator, optimizer: Any) -> Any:
    """The gradient scaler of fp16; None in other precisions."""
    return optimizer.optimizer.torch_autocast_gradscaler if uses_deepspeed(accelerator) else accelerator.scaler


def restore_random_state(state: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Restores the random states of this process. If the number of processes changed, seeds them by seed, step and
    process."""
    if len(state["random_states"]) != accelerator.num_processes:
        set_seed(state["recipe"]["seed"] * 1_000_003 + state["step"], device_specific=True)
        return
    mine = state["random_states"][accelerator.process_index]
    random.setstate((mine["python"][0], tuple(mine["python"][1]), mine["python"][2]))
    key = mine["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state({**mine["numpy"], "state": {**mine["numpy"]["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)


def versions() -> dict[str, str]:
    """Versions of the software that affects the numbers of a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of an earlier run, so that a new run can use `folder`. Returns the new name, or None."""
    if not (folder / "metrics.jsonl").exists():
        return None
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}-{number}"))


def _random_state(device: torch.device) -> dict[str, Any]:
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - timm's Mixup draws from it
    key = numpy["state"].pop("key")
    state: dict[str, Any] = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": numpy,
        "numpy_key": torch.from_numpy(key.astype(np.int64)),  # torch cannot send uint32 between processes
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
