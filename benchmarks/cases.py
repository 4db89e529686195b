"""Every case that is run, declared once: which ops and steps, at which sizes, on a GPU, on a CPU, in a smoke test.

1568 tokens are a clip of 16 x 224 x 224 pixels, of which 95% masking leaves 78 visible and 90% tube masking 160.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from finetune_step import FinetuneStep
from official_repository import ADAMAE, repository_name
from op_base import OpCase
from op_cases import AssembleTokens, DrawMask, GatherTokens, ReconstructionError, SamplingLoss
from rows import OFFICIAL, PRODUCTS
from steps import Masking, StepCase

StepGroup = tuple[StepCase | FinetuneStep, ...]  # what is compared; on a CPU they take turns

_BF16, _UINT8 = torch.bfloat16, torch.uint8
_TOKENS, _VISIBLE = 1568, 78
_SIZE = (_TOKENS, _VISIBLE)
_MASKINGS: tuple[Masking, ...] = ("adaptive", "random", "tube", "frame")


def op_cases(device: torch.device, quick: bool) -> tuple[OpCase, ...]:
    """The suite "ops"."""
    if quick:
        return _QUICK_OPS
    return _GPU_OPS if device.type == "cuda" else _CPU_OPS


def step_groups(device: torch.device, quick: bool, repositories: Sequence[Path]) -> list[StepGroup]:
    """The suite "steps", with the models of official repositories where such are given."""
    if quick:
        tiny = StepCase(clips=2, dtype=torch.float32, img_size=64, depth=1)
        return [_with_baselines(tiny, repositories)]
    if device.type == "cuda":
        return [*_gpu_steps(), _with_baselines(StepCase(clips=64), repositories)]
    step = StepCase(clips=2, dtype=torch.float32)
    others = replace(step, masking="random"), replace(step, masking="tube", mask_ratio=0.9)
    fp32 = replace(step, implementation=PRODUCTS), *_with_baselines(step, repositories), *others
    bf16 = _with_baselines(replace(step, dtype=_BF16), ())
    return [tuple(dict.fromkeys(fp32)), bf16]


def finetune_groups(device: torch.device, quick: bool) -> list[StepGroup]:
    """The suite "finetune": a step of the classifier, which has no baseline."""
    if quick:
        return []
    return [(FinetuneStep(64, _BF16) if device.type == "cuda" else FinetuneStep(clips=2),)]


def sweep_op_cases(device: torch.device, quick: bool) -> tuple[OpCase, ...]:
    """The ops of the suite "sweep": over the tokens of a clip."""
    if quick:
        return (DrawMask(2, 128, 6), DrawMask(2, 256, 12))
    sizes = [(tokens, tokens // 20) for tokens in (1568, 3136, 6272, 18432)]
    if device.type == "cuda":
        return tuple(DrawMask(256, *size) for size in sizes)
    return tuple(kind(4, *size) for size in sizes for kind in (DrawMask, GatherTokens))


def sweep_step_cases(device: torch.device, quick: bool) -> tuple[StepCase, ...]:
    """The steps of the suite "sweep": adaptive beside random masking, over clips of a batch and tokens of a clip."""
    if quick or device.type == "cpu":
        return ()
    clips = [StepCase(clips=clips) for clips in (1, 4, 16, 64, 256)]
    tokens = [  # 1568, 3136, 6272 and 18432 of them, in batches of about 50,000
        StepCase(clips=clips, num_frames=frames, img_size=size)
        for clips, frames, size in ((32, 16, 224), (16, 32, 224), (8, 64, 224), (2, 64, 384))
    ]
    return tuple(replace(case, masking=masking) for case in clips + tokens for masking in _MASKINGS[:2])


def _gpu_steps() -> list[StepGroup]:
    base = [StepCase(masking, ratio) for ratio in (0.9, 0.95) for masking in _MASKINGS]
    sizes = [StepCase(masking, size=size) for size in ("small", "large") for masking in _MASKINGS[:2]]
    memory = [StepCase(clips=16, implementation=OFFICIAL), StepCase(clips=16), StepCase("tube", 0.9, clips=16)]
    compiled = [StepCase(compiled=True), StepCase("random", compiled=True), StepCase("tube", 0.9, compiled=True)]
    products = StepCase(implementation=PRODUCTS)
    return [(case,) for case in (*base, *sizes, products, *memory, *compiled)]


def _with_baselines(case: StepCase, repositories: Sequence[Path]) -> StepGroup:
    """The case, after the official code for it; with VideoMAE's repository, its masking beside ours of that kind."""
    found = [replace(case, implementation=OFFICIAL)]
    if case.clips >= 64:
        found.append(replace(case, implementation=OFFICIAL, compiled=True))
    tube = replace(case, masking="tube", mask_ratio=0.9)
    for path in repositories:
        name = repository_name(path)
        ours = case if name == ADAMAE else tube
        found += [replace(ours, implementation=name, repository=path), ours]
    return tuple(dict.fromkeys((*found, case)))


_GPU_OPS: tuple[OpCase, ...] = (
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
    SamplingLoss(32, *_SIZE, "forward+backward", compile_official=True),
    SamplingLoss(256, *_SIZE, "forward+backward"),
)

_CPU_OPS: tuple[OpCase, ...] = (
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
    SamplingLoss(16, *_SIZE, "forward+backward", compile_official=True),
)

_TINY = (2, 128, 6)
_QUICK_OPS: tuple[OpCase, ...] = (
    DrawMask(*_TINY),
    GatherTokens(*_TINY, width=32),
    GatherTokens(*_TINY, "backward", _BF16, width=32),
    AssembleTokens(*_TINY, width=32),
    AssembleTokens(*_TINY, "backward", width=32, order="restore"),
    ReconstructionError(*_TINY, grid=(8, 4, 4), video_dtype=_UINT8),
    ReconstructionError(*_TINY, "forward+backward", _BF16, grid=(8, 4, 4), kind="l1", normalize=False),
    SamplingLoss(*_TINY, "forward+backward"),
)
