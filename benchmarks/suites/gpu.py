"""Every case that gpu.py measures, declared once, in the order of what is most worth knowing.

1568 tokens are a clip of 16 x 224 x 224 pixels, of which 95% masking leaves 78 visible and 90% tube masking 160. In
each suite ours comes before what it is compared with, and what takes long to compile comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from adamae_sampler.sampler import Masking
from benchmarks.core.rows import COMPILED, COPY, OFFICIAL, OURS, PRODUCTS
from benchmarks.ops.base import OpCase
from benchmarks.ops.cases import AssembleTokens, DrawMask, GatherTokens, ReconstructionError, SamplingLoss
from benchmarks.steps.finetune import FinetuneStep
from benchmarks.steps.options import FAST, option_groups
from benchmarks.steps.step import AnyStep, StepCase
from benchmarks.suites.cpu import QUICK_FINETUNE, QUICK_OPS, QUICK_STEP
from benchmarks.suites.measure import Unit

SUITES = ("steps", "ops", "compiled", "options", "finetune", "sweep")

_BF16, _UINT8 = torch.bfloat16, torch.uint8
_SIZE = (1568, 78)
_MASKINGS: tuple[Masking, ...] = ("adaptive", "random")
_STORES_SCORES = 64  # clips of a step that keeps its attention matrices: about 30 GB of them


def units(suite: str, device: torch.device, quick: bool) -> list[Unit]:
    """The units of a suite, in the order in which they are measured."""
    if suite == "ops":
        return _op_units(suite, QUICK_OPS if quick else _OPS, device)
    steps: list[AnyStep] = list(dict.fromkeys(_STEPS[suite](quick)))
    return [Unit(suite, step) for step in steps]


def is_slow_to_compile(unit: Unit) -> bool:
    """Whether compilation delays the unit's first number."""
    return COMPILED in unit.label or getattr(unit.case, "compiled", "") != ""


def _op_units(suite: str, cases: Iterable[OpCase], device: torch.device) -> list[Unit]:
    """Ours for every case, with the copy beside it; then the baselines."""
    found = [Unit(suite, case, name) for case in cases for name in (COPY, OURS)]
    found += [Unit(suite, case, OFFICIAL) for case in cases]
    return found + [Unit(suite, case, COMPILED) for case in cases if COMPILED in case.baselines]


def _headline_steps(quick: bool) -> list[AnyStep]:
    step = QUICK_STEP if quick else StepCase()
    middle, few = (step, step) if quick else (replace(step, clips=_STORES_SCORES), replace(step, clips=16))
    return [
        *_headline(step),
        *_headline(few),
        middle,
        replace(few, implementation=OFFICIAL),
        replace(middle, implementation=OFFICIAL),
        replace(step, implementation=PRODUCTS),
    ]


def _headline(step: StepCase) -> list[AnyStep]:
    tube = replace(step, masking="tube", mask_ratio=0.9)
    return [step, replace(step, **FAST), replace(step, masking="random"), tube]


def _compiled_steps(quick: bool) -> list[AnyStep]:
    if quick:
        return [replace(QUICK_STEP, compiled="blocks")]
    step = StepCase()
    official = replace(step, implementation=OFFICIAL, clips=_STORES_SCORES)
    return [
        *(replace(each, compiled="blocks") for each in (step, replace(step, **FAST), replace(step, masking="random"))),
        replace(step, compiled="blocks", clips=16),
        replace(step, compiled="whole"),
        replace(step, masking="random", compiled="whole"),
        replace(official, compiled="whole"),
    ]


def option_step(quick: bool) -> StepCase:
    """The exact method's step that the options are measured beside."""
    return QUICK_STEP if quick else StepCase(clips=_STORES_SCORES)


def _option_steps(quick: bool) -> list[AnyStep]:
    steps: list[AnyStep] = [case for group in option_groups(option_step(quick)).values() for case in group.values()]
    return sorted(steps, key=lambda case: case.implementation == OFFICIAL)


def _finetune_steps(quick: bool) -> list[AnyStep]:
    return [QUICK_FINETUNE if quick else FinetuneStep(64, _BF16)]


def _sweep_steps(quick: bool) -> list[AnyStep]:
    """Adaptive beside random masking, over clips of a batch, tokens of a clip and sizes."""
    if quick:
        return [replace(QUICK_STEP, masking=masking, clips=1) for masking in _MASKINGS]
    clips = [StepCase(clips=clips) for clips in (1, 4, 16, 64)]  # 256 of them and others are among the headline steps
    tokens = [  # 1568, 3136, 6272 and 18432 of them, in batches of about 50,000
        StepCase(clips=clips, num_frames=frames, img_size=size)
        for clips, frames, size in ((32, 16, 224), (16, 32, 224), (8, 64, 224), (2, 64, 384))
    ]
    sizes: list[StepCase] = [StepCase(clips=64, size=size) for size in ("small", "large")]
    pairs = [replace(case, masking=masking) for case in clips + tokens + sizes for masking in _MASKINGS]
    known = _headline_steps(quick)
    return [case for case in pairs if case not in known]


_STEPS: dict[str, Any] = {
    "steps": _headline_steps,
    "compiled": _compiled_steps,
    "options": _option_steps,
    "finetune": _finetune_steps,
    "sweep": _sweep_steps,
}

_OPS: tuple[OpCase, ...] = (
    DrawMask(32, *_SIZE),
    DrawMask(256, *_SIZE, compile_official=True),
    DrawMask(1024, *_SIZE),
    DrawMask(256, 18432, 921),
    GatherTokens(1024, *_SIZE, dtype=_BF16, compile_official=True),
    GatherTokens(1024, *_SIZE, "backward", _BF16, compile_official=True),
    AssembleTokens(1024, *_SIZE, dtype=_BF16, compile_official=True),
    AssembleTokens(1024, *_SIZE, "backward", _BF16, compile_official=True),
    AssembleTokens(1024, *_SIZE, dtype=_BF16, order="restore"),
    AssembleTokens(1024, *_SIZE, "backward", _BF16, order="restore"),
    ReconstructionError(256, *_SIZE, dtype=_BF16, video_dtype=_UINT8),
    ReconstructionError(256, *_SIZE, dtype=_BF16, video_dtype=_BF16),
    ReconstructionError(256, *_SIZE, dtype=_BF16, compile_official=True),
    ReconstructionError(256, *_SIZE, "forward+backward", _BF16, video_dtype=_UINT8),
    ReconstructionError(256, *_SIZE, "forward+backward", _BF16, video_dtype=_BF16),
    ReconstructionError(256, *_SIZE, "forward+backward", _BF16, compile_official=True),
    ReconstructionError(256, *_SIZE, "forward+backward", _BF16, video_dtype=_UINT8, kind="l1", normalize=False),
    SamplingLoss(32, *_SIZE, "forward+backward"),  # its loop over clips does not compile
    SamplingLoss(256, *_SIZE, "forward+backward"),
)
