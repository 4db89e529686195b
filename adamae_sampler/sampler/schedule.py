"""A number that changes over training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ramp(nn.Module):
    """A number that goes from `start` to `end` in a straight line, and then stays there.

    Each call in training mode counts one step; calls in evaluation mode count none. Nothing is read from the device, so
    a call compiles, and a CUDA graph counts each replay.

    Both buffers are saved with the state dict: `step`, the calls so far, and `num_steps`. So a loaded ramp goes on
    where it was saved, with the length that it was saved with.

    Args:
        start: value of the first call.
        end: value after `num_steps` calls.
        num_steps: calls from start to end.

    Raises:
        ValueError: the number of steps is no whole number of at least 1.

    >>> ramp = Ramp(1.0, 0.5, 2)
    >>> [ramp().item() for _ in range(4)]
    [1.0, 0.75, 0.5, 0.5]
    """

    step: Tensor
    num_steps: Tensor

    def __init__(self, start: float, end: float, num_steps: int) -> None:
        super().__init__()
        _check_length(num_steps)
        self.start, self.end = start, end
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_steps", torch.tensor(num_steps, dtype=torch.int64))

    def forward(self) -> Tensor:
        """The value of this call, a 0-dim fp32 tensor."""
        value = self.value()
        self.count()
        return value

    def count(self) -> None:
        """Counts a call, in training mode."""
        if self.training:
            self.step.add_(1)

    def value(self) -> Tensor:
        """The value of the next call; this counts none."""
        return self.start + (self.end - self.start) * (self.step / self.num_steps).clamp(max=1.0)

    def set(self, step: int, num_steps: int) -> None:
        """Sets how many calls are done, and how many there are from start to end.

        Raises:
            ValueError: a number is no whole number, `step` is below 0 or `num_steps` below 1.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step={step!r}, expected a whole number of calls, 0 or more.")
        _check_length(num_steps)
        self.step.fill_(step)
        self.num_steps.fill_(num_steps)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"start={self.start}, end={self.end}"


def _check_length(num_steps: int) -> None:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}, expected a whole number of calls, 1 or more.")
