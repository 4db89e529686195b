"""A training step as one CUDA graph: captured once, then replayed, which saves the time of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from common.devices import precision_of
from training.recipe import Recipe

Part = tuple[dict[str, Any], int]  # a batch, and its number in the run
Update = Callable[[Iterable[Part]], None]

_WARM_UP = 3  # steps before the capture: libraries choose kernels and allocate memory in them


def check_graph(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ValueError for settings that a graph does not support, or that were never tested with one."""
    obstacles = {
        f"a CUDA device (found {accelerator.device})": accelerator.device.type != "cuda",
        f"one process (found {accelerator.num_processes})": accelerator.num_processes > 1,
        "bf16 or fp32 (the gradient scaler of fp16 reads from the device)": precision_of(accelerator) == "fp16",
        "a run without --checkpoint-activations": recipe.checkpoint_activations,
    }
    if wanted := [text for text, there in obstacles.items() if there]:
        raise ValueError(f"--graph needs {'; '.join(wanted)}.")


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of each group, times its `lr_scale`. A rate that is a tensor, read by a graph, changes in place."""
    for group in optimizer.param_groups:
        mine = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(mine)
        else:
            group["lr"] = mine


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device, capturable: bool) -> None:
    """Makes the optimizer's step capturable by a graph, or not; a restored checkpoint may have set it otherwise."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device) if capturable else float(group["lr"])
        group["capturable"] = capturable


class GraphedUpdate:
    """Captures an update after a few calls, and replays it from then on.

    Random numbers are drawn afresh in each replay, from the device's default generator. The update must write its
    results into the same tensors each time, read nothing from the device, and get batches of the same shapes.

    Args:
        update: runs a step on its batches, optimizer included.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self._calls = 0
        self._inputs: list[Part] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, parts: Iterable[Part]) -> None:
        """One step on these batches.

        Raises:
            ValueError: the shape of a batch differs from the captured shape.
        """
        now = list(parts)
        self._calls += 1
        if self._calls <= _WARM_UP:
            aside(self.update, now)
            return
        if self._replay is None:
            self._inputs = [({name: _own(each) for name, each in batch.items()}, number) for batch, number in now]
            self._replay = capture(self.update, self._inputs)
        for (mine, _), (batch, _) in zip(self._inputs, now, strict=True):
            for name, each in mine.items():
                if isinstance(each, Tensor):
                    if each.shape != batch[name].shape:
                        raise ValueError(f"{name} is {tuple(batch[name].shape)}, expected {tuple(each.shape)}.")
                    each.copy_(batch[name], non_blocking=True)
        self._replay()


def _own(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def aside(update: Update, parts: list[Part]) -> None:
    """Runs the update on a side stream, as the capture does: the default stream cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update(parts)
    torch.cuda.current_stream().wait_stream(stream)


def capture(update: Update, parts: list[Part]) -> Callable[[], None]:
    """Captures the update without running it; returns the replay, which reads the tensors of `parts`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread pins the next batch
        update(parts)
    return graph.replay
