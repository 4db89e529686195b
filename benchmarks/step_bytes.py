"""Bytes that a training step moves and keeps on a GPU, counted without one, from shapes and dtypes.

    python -m benchmarks.step_bytes        # ViT-B at 95% of 256 clips in bf16, exact and fast; half a minute

The step runs on fake CUDA tensors under the rules of CUDA's autocast, and what each operator reads and writes is added
up by family. A view moves nothing; an operator of the package counts its inputs and outputs whole, though a gather
reads a part of them. Attention is FlashAttention, which keeps no scores. The optimizer is left out, which costs the
same for any number of clips. Rows are added to benchmarks/results/step_bytes.csv, where those of other commits stay.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamae_sampler.ops import backend
from benchmarks.core.commit import current_commit
from benchmarks.core.rows import RESULTS, read_rows, read_texts, write_rows
from benchmarks.pages.cpu import bytes_table
from benchmarks.steps.options import FAST
from benchmarks.steps.step import StepCase, our_forward

CUDA = torch.device("cuda")
CASES = {"exact": StepCase(), "fast": replace(StepCase(), **FAST)}
_PRODUCTS = {"mm", "addmm", "bmm", "convolution", "convolution_backward"}
_MOVES_NOTHING = ("empty", "new_empty", "detach", "device", "_unsafe_view")


@dataclass(frozen=True)
class Bytes:
    """GiB of one clip that a setting's step moves, by family, and that its forward pass keeps for the backward one."""

    setting: str
    products: float
    attention: float
    package: float
    elementwise: float
    saved: float
    saved_fp32: float
    largest_fp32: int  # values of one clip of the largest fp32 tensor whose size grows with the clips
    commit: str


class Count(TorchDispatchMode):
    """Bytes read and written by operator, and the fp32 tensors that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[tuple[str, str]] = Counter()
        self.fp32: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.fp32.update(tuple(each.shape) for each in made if each.dtype == torch.float32)
        namespace, _, name = func._schema.name.partition("::")
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and not name.startswith(_MOVES_NOTHING):
            read = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            self.moved[_family(namespace, name), name] += sum(_size(each) for each in [*read.values(), *made])
        return out


def _size(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())  # an expanded one lies there once


def _family(namespace: str, name: str) -> str:
    if namespace == "adamae_sampler":
        return "package"
    return "products" if name in _PRODUCTS else "attention" if "attention" in name else "elementwise"


def count_step(case: StepCase) -> tuple[Count, list[Tensor], int]:
    """Counts the bytes that both passes move, the bytes kept between them, and the parameters that got a gradient."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash_attention))
        stack.enter_context(mock.patch.object(backend, "_find_obstacle", return_value=""))
        model, forward = our_forward(case, CUDA)
        with Count() as count:
            with _cuda_autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = forward()
            reached = backward(loss)
        for each in [*model.parameters(), *model.buffers()]:
            kept.pop(each.untyped_storage()._cdata, None)
    return count, list(kept.values()), reached


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)[0]
    return out


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """`torch.autocast` switches itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def backward(loss: Tensor) -> int:
    """Runs the graph's nodes from Python, since torch's engine wants a GPU for CUDA tensors; returns how many leaves it
    reaches.

    As the engine does, it sums gradients of what was broadcast and casts them to the dtype of what they belong to.
    """
    waits: Counter[Any] = Counter()
    root: Any = loss.grad_fn
    found, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waits[node] += 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    gradients: defaultdict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[root][0] = torch.ones_like(loss)
    ready, reached = [root], 0
    with torch.no_grad():
        while ready:
            node = ready.pop()
            mine = gradients.pop(node, {})
            if type(node).__name__ == "AccumulateGrad":
                reached += bool(mine)
                continue
            edges = node.next_functions
            results: Any = [None] * len(edges)
            if mine:
                upstream = [mine.get(index) for index in range(len(node._input_metadata))]
                results = node.apply(*upstream) if hasattr(node, "apply") else node(*upstream)
                results = results if isinstance(results, (tuple, list)) else [results]
            if mine and hasattr(node, "apply"):  # written in Python: a result too for what is no tensor and has no edge
                results = [each for each in results if each is not None]
                edges = [edge for edge in edges if edge[0] is not None]
            for (target, index), gradient in zip(edges, results, strict=True):
                if target is None:
                    continue
                if gradient is not None:
                    metadata = target._input_metadata[index]
                    gradient = gradient.sum_to_size(tuple(metadata.shape)).to(metadata.dtype)
                    earlier = gradients[target].get(index)
                    gradients[target][index] = gradient if earlier is None else earlier + gradient
                waits[target] -= 1
                if waits[target] == 0:
                    ready.append(target)
    return reached


def measure(setting: str, case: StepCase, commit: str) -> Bytes:
    """Counts a setting and returns its row."""
    count, kept, _ = count_step(case)
    unit = 2**30 * case.clips
    moved: Counter[str] = Counter()
    for (family, _), size in count.moved.items():
        moved[family] += size
    sizes = [(each.untyped_storage().nbytes() / unit, each.dtype) for each in kept]
    fp32 = sum(size for size, dtype in sizes if dtype == torch.float32)
    of_clips = [shape for shape in count.fp32 if shape and shape[0] % case.clips == 0]
    largest = max(torch.Size(shape).numel() // case.clips for shape in of_clips)
    return Bytes(
        setting=setting,
        products=moved["products"] / unit,
        attention=moved["attention"] / unit,
        package=moved["package"] / unit,
        elementwise=moved["elementwise"] / unit,
        saved=sum(size for size, _ in sizes),
        saved_fp32=fp32,
        largest_fp32=largest,
        commit=commit,
    )


def main(output: Path, commit: str) -> None:
    """Counts, prints the table and writes the rows."""
    rows = [row for row in read_rows(output, Bytes) if row.commit != commit]
    rows += [measure(setting, case, commit) for setting, case in CASES.items()]
    write_rows(output, Bytes, rows)
    print(bytes_table(read_texts(output)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_bytes.csv", help="file for the rows")
    parser.add_argument("--commit", default="", help="what the rows name as the commit; git is asked if it is empty")
    given = parser.parse_args()
    main(given.output, given.commit or current_commit())
