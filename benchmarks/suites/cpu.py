"""Every case that run.py measures on a CPU, and the tiny cases of --quick.

1568 tokens are a clip of 16 x 224 x 224 pixels, of which 95% masking leaves 78 visible and 90% tube masking 160.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.core.rows import OFFICIAL, PRODUCTS
from benchmarks.ops.base import OpCase
from benchmarks.ops.cases import AssembleTokens, DrawMask, GatherTokens, ReconstructionError, SamplingLoss
from benchmarks.steps.finetune import FinetuneStep
from benchmarks.steps.options import Part, option_groups, part_cases
from benchmarks.steps.step import StepCase

_BF16, _UINT8 = torch.bfloat16, torch.uint8
_SIZE = (1568, 78)
QUICK_STEP = StepCase(clips=2, dtype=torch.float32, img_size=64, depth=1)
QUICK_FINETUNE = FinetuneStep(clips=1, img_size=32, depth=1)


def op_cases(quick: bool) -> tuple[OpCase, ...]:
    """The suite "ops"."""
    return QUICK_OPS if quick else _OPS


def step_groups(quick: bool) -> list[list[StepCase]]:
    """The suite "steps": each group takes turns."""
    step = QUICK_STEP if quick else StepCase(clips=2, dtype=torch.float32)
    pair = [replace(step, implementation=OFFICIAL), step]
    if quick:
        return [pair]
    others = [replace(step, masking=name) for name in ("random", "block", "grid", "motion", "hard")]
    others.append(replace(step, masking="tube", mask_ratio=0.9))
    bf16 = [replace(case, dtype=torch.bfloat16) for case in pair]
    return [[replace(step, implementation=PRODUCTS), *pair, *others], bf16]


def option_groups_of(quick: bool) -> dict[str, dict[str, StepCase]]:
    """The suite "options": steps by group and name."""
    return option_groups(QUICK_STEP if quick else StepCase(clips=2, dtype=torch.float32))


def part_groups(quick: bool) -> list[list[Part]]:
    """The suite "options": the parts of a step, those with the same number of tokens together."""
    parts = part_cases(2, quick)
    return [[part for part in parts if part.name == name] for name in dict.fromkeys(part.name for part in parts)]


_OPS: tuple[OpCase, ...] = (
    DrawMask(2, *_SIZE),
    DrawMask(16, *_SIZE, compile_official=True),
    GatherTokens(8, *_SIZE, compile_official=True),
    GatherTokens(8, *_SIZE, "backward", compile_official=True),
    AssembleTokens(8, *_SIZE, compile_official=True),
    AssembleTokens(8, *_SIZE, "backward", compile_official=True),
    AssembleTokens(8, *_SIZE, order="restore"),
    AssembleTokens(8, *_SIZE, "backward", order="restore"),
    ReconstructionError(2, *_SIZE, video_dtype=_UINT8),
    ReconstructionError(2, *_SIZE, compile_official=True),
    ReconstructionError(2, *_SIZE, "forward+backward", video_dtype=_UINT8),
    ReconstructionError(2, *_SIZE, "forward+backward", compile_official=True),
    ReconstructionError(2, *_SIZE, "forward+backward", kind="l1", normalize=False),
    SamplingLoss(2, *_SIZE, "forward+backward"),
    SamplingLoss(16, *_SIZE, "forward+backward"),  # its loop over clips does not compile
)

_TINY = (2, 128, 6)
QUICK_OPS: tuple[OpCase, ...] = (
    DrawMask(*_TINY),
    GatherTokens(*_TINY, width=32),
    GatherTokens(*_TINY, "backward", _BF16, width=32),
    AssembleTokens(*_TINY, width=32),
    AssembleTokens(*_TINY, "backward", width=32, order="restore"),
    ReconstructionError(*_TINY, grid=(8, 4, 4), video_dtype=_UINT8),
    ReconstructionError(*_TINY, "forward+backward", _BF16, grid=(8, 4, 4), kind="l1", normalize=False),
    SamplingLoss(*_TINY, "forward+backward"),
)
