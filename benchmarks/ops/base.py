"""An op at one size: its inputs, the package's call and the official one, a check that both agree, a floor in bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.core.rows import COMPILED, OFFICIAL, OURS, Subject
from benchmarks.core.timing import Call

Direction = Literal["forward", "backward", "forward+backward"]
Tensors = dict[str, Tensor]
Implementation = Callable[[Tensors], Any]

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of norms; a bf16 value has 8 bits


@dataclass(frozen=True)
class OpCase(ABC):
    """One op at one size; the subclasses are the ops. B clips, N tokens, K visible, M = N - K masked.

    Attributes:
        clips: B.
        tokens: N.
        visible: K.
        direction: the pass that is timed. "forward" runs without gradients, "backward" on the graph of one forward.
        dtype: of tokens or predictions.
        compile_official: time `torch.compile` of the official code too, which takes a while to compile.
        width: values of a token: D, P for a prediction, 0 where a token has only a score.
    """

    clips: int
    tokens: int
    visible: int
    direction: Direction = "forward"
    dtype: torch.dtype = torch.float32
    compile_official: bool = False
    width: int = 0

    op: ClassVar[str]
    out_axes: ClassVar[str] = ""  # the letters of the output's shape: "BKD" is [clips, visible, width]
    leaves: ClassVar[tuple[str, ...]] = ()  # the inputs with a gradient
    copies: ClassVar[tuple[str, ...]] = ()  # "output", and leaves whose gradient is: equal bit for bit, not close

    @property
    def masked(self) -> int:
        """M, the number of masked tokens."""
        return self.tokens - self.visible

    @property
    def detail(self) -> str:
        """The settings of this case besides sizes, dtypes and direction."""
        return ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output that a backward pass starts from."""
        sizes = {"B": self.clips, "N": self.tokens, "K": self.visible, "M": self.masked, "D": self.width}
        return tuple(sizes[axis] for axis in self.out_axes)

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self.dtype

    @property
    def dtypes(self) -> str:
        """The dtypes of the inputs, for people and rows."""
        return name_of(self.dtype)

    @property
    def name(self) -> str:
        """The name that people read, the same for all implementations."""
        width = f" x {self.width}" if self.width else ""
        size = f"{self.clips} x {self.tokens}{width}, {self.visible} visible"
        return ", ".join(filter(None, (size, self.detail, self.dtypes, self.direction)))

    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""
        return Subject(
            suite,
            case=f"{self.op} {self.name}",
            op=self.op,
            direction=self.direction,
            clips=self.clips,
            tokens=self.tokens,
            visible=self.visible,
            dtype=self.dtypes,
            width=self.width or None,
            shape="x".join(str(each) for each in (self.clips, self.tokens, self.width) if each),
            bytes=self.bytes,
        )

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The fewest bytes that must move: each input byte needed read once, each output byte written once.

        "forward+backward" counts as one call, though both passes read what both need.
        """

    @abstractmethod
    def make(self, device: torch.device) -> Tensors:
        """Fresh random inputs for all implementations, none of which asks for a gradient yet."""

    @abstractmethod
    def ours(self, x: Tensors) -> Any:
        """The package's op."""

    @abstractmethod
    def official(self, x: Tensors) -> Any:
        """The official code of the same op."""

    def inputs(self, device: torch.device) -> Tensors:
        """`make`, with the gradients that the direction asks for, and one of the output: "cotangent"."""
        x = self.make(device)
        if self.direction != "forward":
            x["cotangent"] = torch.randn(self.out_shape, device=device).to(self.out_dtype)
            for name in self.leaves:
                x[name].requires_grad_()
        return x

    @property
    def baselines(self) -> tuple[str, ...]:
        """The implementations that the package is compared with."""
        return (OFFICIAL, COMPILED) if self.compile_official else (OFFICIAL,)

    def implementation(self, name: str) -> Implementation:
        """The function of an implementation: the package's or a baseline."""
        if name == OURS:
            return self.ours
        return torch.compile(self.official) if name == COMPILED else self.official

    def call(self, implementation: Implementation, x: Tensors) -> Call:
        """The pass that is timed; it returns the outputs, or the gradients of the leaves."""
        if self.direction == "forward":
            return partial(implementation, x)
        if self.direction == "backward":
            return partial(self.gradients, implementation(x), x, retain_graph=True)
        return lambda: self.gradients(implementation(x), x)

    def gradients(self, out: Tensor, x: Tensors, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """The gradients of the leaves for the output's "cotangent"."""
        leaves = [x[name] for name in self.leaves]
        return torch.autograd.grad(out, leaves, x["cotangent"], retain_graph=retain_graph)

    def check(self, device: torch.device) -> None:
        """Raises AssertionError unless the package and the official code agree, on fresh inputs."""
        self.compare(self.inputs(device))

    def compare(self, x: Tensors) -> None:
        """Raises AssertionError unless outputs, and gradients where the direction has them, are the official ones."""
        got, wanted = self.ours(x), self.official(x)
        self.expect_same("output", got, wanted, wanted.dtype, "output" in self.copies)
        if self.direction != "forward":
            for leaf, a, b in zip(self.leaves, self.gradients(got, x), self.gradients(wanted, x), strict=True):
                self.expect_same(f"gradient of {leaf}", a, b, self.dtype, leaf in self.copies)

    def expect_same(self, what: str, got: Tensor, wanted: Tensor, dtype: torch.dtype, is_copy: bool = False) -> None:
        """Raises AssertionError unless |got - wanted| <= the dtype's tolerance x |wanted|, or 0 for copies.

        NaN never passes.
        """
        self.expect(got.shape == wanted.shape, what, f"shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
        if is_copy:
            count = int((got != wanted).sum())
            self.expect(count == 0, what, f"{count} of {wanted.numel()} values differ")
            return
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
        difference, size = float(norm(got.detach() - wanted.detach())), float(norm(wanted.detach()))
        bound = _TOLERANCE[dtype] * size
        self.expect(difference <= bound, what, f"differs by {difference:.2e}, allowed {bound:.2e}")

    def expect(self, condition: bool, what: str, message: str) -> None:
        """Raises AssertionError, with the case, unless the condition holds."""
        if not condition:
            raise AssertionError(f"{self.op} ({self.name}), {what}: {message}.")


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")
