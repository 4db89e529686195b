"""Checkpoints: everything that a run needs to go on, in safetensors files that are whole or not there.

A file holds tensors and, as JSON, the numbers and strings between them; nothing is ever unpickled. Weights and
optimiser are stored by the names of the parameters, for any number of processes and any wrapper (whole.py).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn

from common.devices import uses_deepspeed
from common.files import remove_partial, replacing, write_tensors
from common.recipe import AnyRecipe, Recipe, Schedule, recipe_from
from common.whole import deal_out, whole_state

CHECKPOINTS = "checkpoints"  # the folder of a run that has them
BEST = "best.safetensors"
_FORMAT = "adamae_sampler training state 4"
_TENSOR = "$tensor"  # marks a tensor's place in the JSON
# Settings that may differ between a run and its resumption; any other makes it another run.
_FREE = {"output", "steps", "epochs", "workers", "log_every", "batch_size", "compile", "graph"}
_FREE |= {"checkpoint_activations", "fused_head"}  # for a run that ended without memory
_FREE |= {"save_every", "save_minutes", "keep_checkpoints", "stop_after_nonfinite", "max_broken", "profile", "tracker"}
_FREE |= {"eval_every", "eval_batch_size", "test_clips", "test_crops"}
_FREE |= {"effective_batch", "data", "train", "val"}  # compared by what they come to
_GONE = {"head_chunks"}  # settings of earlier runs that changed no result
_COMPILE = {True: "whole", False: None}  # what it was in them


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: where they are, step_00001000.safetensors and so on, and best.safetensors.
        keep: how many of the latest are kept.
    """

    folder: Path
    keep: int = 2

    def save(self, state: Mapping[str, Any]) -> Path:
        """Writes a state, then removes older ones; the best by "score" is kept besides.

        Raises:
            OSError: it, or the copy that is the best, cannot be written; those that there are stay.
        """
        tensors: dict[str, Tensor] = {}
        tree = _take_tensors(state, "", tensors)
        path = self.folder / f"step_{state['step']:08d}.safetensors"
        write_tensors(path, tensors, {"state": json.dumps(tree)})
        best = self.folder / BEST
        score, highest = state.get("score"), _score(best)
        if score is not None and (highest is None or score > highest):
            with replacing(best) as aside:
                aside.unlink(missing_ok=True)
                try:
                    os.link(path, aside)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, aside)
        whole = [each for each in self._all() if each <= path and _is_whole(each)]
        for old in self._all():
            if len(whole) >= self.keep and old < whole[self.keep - 1]:
                old.unlink()
        return path

    def begin(self, step: int) -> None:
        """Makes ready for a run that goes on from a step: what was written later, of a course that is left, is renamed
        to *.set_aside, and half-written files of killed processes are removed."""
        remove_partial(self.folder)
        for path in self._all():
            if path.stem > f"step_{step:08d}":
                path.rename(path.with_suffix(".set_aside"))

    def newest(self, kind: str) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint of a script, or None; and why each newer file was passed over."""
        passed_over: list[str] = []
        for path in [*self._all(), *self.folder.glob(BEST)]:
            try:
                _read(path, kind)
                return path, passed_over
            except ValueError as error:
                passed_over.append(str(error))
        return None, passed_over

    def _all(self) -> list[Path]:
        """All files, the newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)


def _take_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with a mark in place of each tensor, which is put into `tensors` by its path."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        return {str(key): _take_tensors(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_take_tensors(value, f"{name}/{number}", tensors) for number, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}; a checkpoint holds tensors, numbers, strings and containers.")


def _put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _put_tensors(value, tensors) for key, value in tree.items()}
    return [_put_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


def _header(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint; raises FileNotFoundError, or ValueError for a file that is not a whole one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run writes {CHECKPOINTS}/ into its output folder.")
    try:
        with safetensors.safe_open(path, "pt") as file:  # checks the lengths that the file states
            tree = json.loads((file.metadata() or {}).get("state", "{}"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or no checkpoint ({error}).") from error
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a training state of these scripts. To start from weights alone, load them with "
            "adamae_sampler.models.load_checkpoint."
        )
    return tree


def _is_whole(path: Path) -> bool:
    try:
        _header(path)
    except ValueError:
        return False
    return True


def _score(path: Path) -> float | None:
    """The score of a checkpoint; None if it has none, is not there, or is damaged."""
    try:
        score: float | None = _header(path).get("score")
        return score
    except (FileNotFoundError, ValueError):
        return None


def _read(path: Path, kind: str) -> dict[str, Any]:
    """A checkpoint without its tensors, of the script of this kind."""
    tree = _header(path)
    if tree["kind"] != kind:
        raise ValueError(f"{path}: a state of {tree['kind']}.py, which {kind}.py cannot go on from.")
    return tree


def make_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    recipe: Recipe,
    schedule: Schedule,
    more: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Everything that a resumed run needs, on the main process; None on the others, which have to call this too.

    Args:
        accelerator: devices and processes.
        model: prepared.
        optimizer: prepared.
        recipe: the settings.
        schedule: what follows from them.
        more: what the loop adds, tensors, numbers, strings and containers of them: "step", how many are done, from
            which the position in the data follows; "score", how good the model is, or None; and so on.
    """
    weights, optimizer_state = whole_state(accelerator, model, optimizer)
    random_states = gather_object([_random_state(accelerator.device)])
    if not accelerator.is_main_process:
        return None
    return {
        "format": _FORMAT,
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
    """Reads a checkpoint and checks that this run continues it.

    Args:
        path: the file.
        recipe: the settings of this run.
        schedule: what follows from them.
        videos: what tells its data set from others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a whole training state (weights alone cannot be resumed); or its recipe, its videos or its
            effective batch are others; or the run was longer than this one shall be.
    """
    tree = _read(path, recipe.kind)
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
        forbidden.append("videos: as many, with other names or in another order")
    if forbidden:
        raise ValueError(
            f"{path}: that run had other settings:\n  " + "\n  ".join(forbidden) + "\nPass the same ones, or "
            "start a new run."
        )
    if tree["step"] > schedule.steps:
        raise ValueError(f"{path}: it is at step {tree['step']}, this run ends at {schedule.steps}.")
    state: dict[str, Any] = _put_tensors(tree, safetensors.torch.load_file(path))
    return state


def recipe_of_state(kind: type[AnyRecipe], path: Path) -> AnyRecipe:
    """The recipe of a saved run, with the folder it is in now as its output and its effective batch, for any devices.

    Raises:
        FileNotFoundError, ValueError: as `load_state`.
    """
    tree = _read(path, kind.kind)
    now = {"output": str(path.resolve().parent.parent), "effective_batch": tree["effective_batch"]}
    saved = {name: value for name, value in tree["recipe"].items() if name not in _GONE}
    saved["compile"] = _COMPILE.get(saved["compile"], saved["compile"])
    return recipe_from(kind, saved | now)


def restore(state: Mapping[str, Any], accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
    """Puts weights, optimiser and the scale of fp16's losses back; model and optimiser are prepared."""
    deal_out(accelerator, model, optimizer, state["model"], state["optimizer"])
    scaler = _scaler(accelerator, optimizer)
    if scaler is not None and state["scaler"]:  # a run in another precision has none
        scaler.load_state_dict(state["scaler"])


def _scaler(accelerator: Accelerator, optimizer: Any) -> Any:
    """What scales the losses of fp16; None in other precisions."""
    return optimizer.optimizer.torch_autocast_gradscaler if uses_deepspeed(accelerator) else accelerator.scaler


def restore_random_state(state: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Sets this process's random states to those saved; anew, by seed, step and process, for another number of them."""
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


def describe_resumption(path: Path, state: Mapping[str, Any], accelerator: Accelerator, batch_size: int) -> str:
    """Where a run goes on, and what is not exactly as it would have been without the interruption."""
    then, now = len(state["random_states"]), accelerator.num_processes
    notes = [f"{path} from step {state['step']}"]
    if then != now:
        notes.append(f"{then} processes there, {now} here: the same videos in each step, other masks and dropout")
    elif state["recipe"]["batch_size"] != batch_size:
        notes.append("another batch_size: the same videos in each step, other masks and dropout")
    notes += [
        f"{name} {state['versions'].get(name)} there, {version} here: results may differ"
        for name, version in versions().items()
        if state["versions"].get(name) != version
    ]
    return "; ".join(notes)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of an earlier run, so that a new one neither overwrites nor mixes with it."""
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
