"""Checkpoint files: a training state in a safetensors file, written atomically.

A file holds tensors, and the other values of the state as JSON. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from common.atomic_files import remove_partial, replacing
from common.tensor_files import write_tensors

CHECKPOINTS = "checkpoints"  # folder within the output folder of a run
BEST = "best.safetensors"
FORMAT = "adamae_sampler training state 4"
_TENSOR = "$tensor"  # the key that stands for a tensor in the JSON


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: the folder of step_00001000.safetensors and so on, and of best.safetensors.
        keep: number of the latest checkpoints that are kept.
    """

    folder: Path
    keep: int = 2

    def save(self, state: Mapping[str, Any]) -> Path:
        """Writes a state, then removes older ones. best.safetensors keeps the state with the highest "score".

        Raises:
            OSError: the state or best.safetensors cannot be written. Older checkpoints stay.
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
        """Prepares the folder for a run that goes on from a step.

        Checkpoints of later steps are renamed to *.set_aside. Half-written files of killed processes are removed.
        """
        remove_partial(self.folder)
        for path in self._all():
            if path.stem > f"step_{step:08d}":
                path.replace(path.with_suffix(".set_aside"))

    def newest(self, kind: str) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint of a script, or None, and why each newer file was passed over."""
        passed_over: list[str] = []
        for path in [*self._all(), *self.folder.glob(BEST)]:
            try:
                read_header(path, kind)
                return path, passed_over
            except ValueError as error:
                passed_over.append(str(error))
        return None, passed_over

    def _all(self) -> list[Path]:
        """All files, the newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)


def _take_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with a mark in place of each tensor; puts the tensors into `tensors`, by their path in the tree."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        return {str(key): _take_tensors(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_take_tensors(value, f"{name}/{number}", tensors) for number, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}, expected tensors, numbers, strings or containers.")


def _put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_take_tensors`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _put_tensors(value, tensors) for key, value in tree.items()}
    return [_put_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


def _header(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint; raises FileNotFoundError, or ValueError if the file is no whole checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run keeps its checkpoints in {CHECKPOINTS}/ of --output.")
    try:
        with safetensors.safe_open(path, "pt") as file:  # checks the length of the file too
            tree = json.loads((file.metadata() or {}).get("state", "{}"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({error}).") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
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
    """The score of a checkpoint; None if the file has no score, is missing or is damaged."""
    try:
        score: float | None = _header(path).get("score")
        return score
    except (FileNotFoundError, ValueError):
        return None


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """A training state without its tensors.

    Args:
        path: the checkpoint.
        kind: the script that resumes, "pretrain" or "finetune".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is not a training state, or comes from another script.
    """
    tree = _header(path)
    if tree["kind"] != kind:
        raise ValueError(f"{path} is a state of {tree['kind']}.py; {kind}.py cannot resume it.")
    return tree


def read_state(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The training state of a checkpoint with its tensors, on the CPU; `header` is from `read_header`."""
    state: dict[str, Any] = _put_tensors(dict(header), safetensors.torch.load_file(path))
    return state
