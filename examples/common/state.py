"""The state of a run on disk: written whole or not at all, read without pickle."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.recipe import AnyRecipe, Recipe, Schedule, recipe_from

_FORMAT = "adamae_sampler training state 2"
# Settings that may differ between a run and its resumption; any other makes it another run.
_FREE = {"output", "steps", "epochs", "workers", "log_every", "save_every", "batch_size", "checkpoint_activations"}
_FREE |= {"eval_every", "eval_batch_size", "test_clips", "test_crops"}


def save_state(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    schedule: Schedule,
    step: int,
    extra: Mapping[str, Any],
) -> None:
    """Writes everything that a resumed run needs: weights, optimiser, step, recipe, random states of all processes.

    `extra` has what the script adds, as tensors, numbers, strings and containers of them.
    """
    random_states = gather_object([_random_state(accelerator.device)])
    if accelerator.is_main_process:
        state = {
            "format": _FORMAT,
            "kind": recipe.kind,
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "recipe": recipe.plain(),
            "clips": schedule.clips,
            "effective_batch": schedule.effective_batch,
            "random_states": random_states,
            "extra": dict(extra),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)  # atomic, so that a run killed here leaves the previous file whole
    accelerator.wait_for_everyone()


def load_state(path: Path, recipe: Recipe, schedule: Schedule, processes: int) -> dict[str, Any]:
    """Reads a state and checks that this run continues it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a training state (weights alone cannot be resumed); or its recipe, number of videos,
            effective batch or number of processes is another; or the run was longer than this one shall be.
    """
    state = _read(path, recipe.kind)
    saved, now = state["recipe"], recipe.plain()
    changed = [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    forbidden = [change for change in changed if change.partition(":")[0] not in _FREE]
    for name, then, today in (
        ("number of videos", state["clips"], schedule.clips),
        ("effective batch", state["effective_batch"], schedule.effective_batch),
        ("processes", len(state["random_states"]), processes),
    ):
        if then != today:
            forbidden.append(f"{name}: {then} -> {today}")
    if forbidden:
        raise ValueError(
            f"--resume {path}: that run had other settings:\n  " + "\n  ".join(forbidden) + "\nPass the same ones, or "
            "start a new run."
        )
    if state["step"] > schedule.steps:
        raise ValueError(f"--resume {path}: it is at step {state['step']}, this run ends at {schedule.steps}.")
    return state


def recipe_of_state(kind: type[AnyRecipe], path: Path) -> AnyRecipe:
    """The recipe of a saved run, with the folder it is in now as its output.

    Raises:
        FileNotFoundError, ValueError: as `load_state`.
    """
    return recipe_from(kind, {**_read(path, kind.kind)["recipe"], "output": str(path.parent)})


def _read(path: Path, kind: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such file; a run writes state.pt into its output folder.")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if state.get("format") != _FORMAT:
        raise ValueError(
            f"--resume {path}: not a training state of this script. To start from weights alone, load them with "
            "adamae_sampler.models.load_checkpoint."
        )
    if state["kind"] != kind:
        raise ValueError(f"--resume {path}: a state of {state['kind']}.py, which {kind}.py cannot go on from.")
    return state


def restore_random_state(state: dict[str, Any], accelerator: Accelerator) -> None:
    """Sets this process's random states to those saved."""
    mine: dict[str, Tensor] = state["random_states"][accelerator.process_index]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)


def set_aside(folder: Path) -> Path | None:
    """Renames the folder of an earlier run, so that a new one neither overwrites nor mixes with it."""
    if not (folder / "metrics.jsonl").exists():
        return None
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}-{number}"))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
