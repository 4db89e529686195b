"""A training step as one CUDA graph: captured once, then launched as a whole, so that Python costs nothing."""

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

_WARM_UP = 3  # steps before the capture, in which libraries choose kernels and allocate


def check_graph(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ValueError for settings that a graph cannot hold, or that were never tried in one."""
    obstacles = {
        f"a CUDA device, and the device is {accelerator.device}": accelerator.device.type != "cuda",
        f"one process, and there are {accelerator.num_processes}": accelerator.num_processes > 1,
        "bf16 or fp32, since fp16's scaler reads from the device": precision_of(accelerator) == "fp16",
        "kept activations: leave out --checkpoint-activations": recipe.checkpoint_activations,
    }
    if wanted := [text for text, there in obstacles.items() if there]:
        raise ValueError(f"--graph needs {'; '.join(wanted)}.")


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of each group, times its `lr_scale`; in place where it is a tensor, which a graph reads."""
    for group in optimizer.param_groups:
        mine = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(mine)
        else:
            group["lr"] = mine


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device, capturable: bool) -> None:
    """Makes the optimizer's step capturable by a graph, or not, whatever a checkpoint set."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device) if capturable else float(group["lr"])
        group["capturable"] = capturable


class GraphedUpdate:
    """An update that is captured after a few calls, and replayed from then on.

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
            ValueError: a batch of another shape than the one that was captured.
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
                        raise ValueError(f"{name} is {tuple(batch[name].shape)}, the graph takes {tuple(each.shape)}.")
                    each.copy_(batch[name], non_blocking=True)
        self._replay()


def _own(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def aside(update: Update, parts: list[Part]) -> None:
    """Runs the update on a stream of its own, as a graph will: the default one cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update(parts)
    torch.cuda.current_stream().wait_stream(stream)


def capture(update: Update, parts: list[Part]) -> Callable[[], None]:
    """Captures the update without running it; returns its replay, which reads the tensors of these parts."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread pins the next batch
        update(parts)
    return graph.replay
