"""Groups of training steps that differ by options of adaptive masking, and parts of a step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamae_sampler import ops
from adamae_sampler.models import PRESETS
from adamae_sampler.models.encoder import Encoder, VideoSize
from adamae_sampler.networks import MHAScoreNetwork, PooledScoreNetwork
from benchmarks.core.rows import OFFICIAL, Subject
from benchmarks.steps.step import Step, StepCase

PartName = Literal["encoder", "exact", "pooled", "pixels"]

FAST: dict[str, Any] = dict(PRESETS["fast"])
PART = "sampler or encoder"  # the op of a `Part`, in rows
_PARTS: tuple[PartName, ...] = ("encoder", "exact", "pooled", "pixels")
# Frames and height of clips, in tokens of 2 x 16 x 16.
_CLIPS = ((16, 224), (32, 224), (64, 224), (64, 384))
_QUICK_CLIPS = ((16, 64), (32, 64))


def option_groups(exact: StepCase) -> dict[str, dict[str, StepCase]]:
    """Steps by group and name; the first of a group is the one that the others are divided by.

    Args:
        exact: a step of the exact method.
    """
    random = replace(exact, masking="random")
    four: dict[str, Any] = {"num_masks": 4, "clips": max(exact.clips // 4, 1)}
    pixels = {name: value for name, value in FAST.items() if name != "decode_ratio"}
    visible_half: dict[str, Any] = {"sample_from": "pixels", "decode_ratio": 0.5}
    return {
        "the official formulation": {
            "official": replace(exact, implementation=OFFICIAL),
            "exact": exact,
            "random": random,
            "fast": replace(exact, **FAST),
        },
        "random masking": {
            "random": random,
            "exact": exact,
            "pooled": replace(exact, score_network="pooled"),
            "pooled, from pixels": replace(exact, **pixels),
        },
        "random masking, visible tokens embedded, half decoded": {
            "random": replace(random, **visible_half),
            "fast": replace(exact, **FAST),
        },
        "random masking, 4 masks of each clip": {
            "random": replace(random, **four),
            "exact": replace(exact, **four),
        },
        "exact": {
            "exact": exact,
            "half decoded": replace(exact, decode_ratio=0.5),
            "prediction held": replace(exact, fused_head=False),
        },
    }


@dataclass(frozen=True)
class Part:
    """Both passes of one part, on the CPU in fp32: a sampler over all tokens, or the encoder over 5% of them.

    Attributes:
        implementation: "encoder", "exact", "pooled" (with the tokens' gradient) or "pixels" (with the shrinking).
        clips: of a batch.
        frames: of a clip.
        height: and width of a frame.
        width: D.
        depth: blocks of the encoder.
    """

    implementation: PartName
    clips: int
    frames: int
    height: int
    width: int = 768
    depth: int = 12

    @property
    def size(self) -> VideoSize:
        """The size of the video."""
        return VideoSize.of(self.height, self.frames, 16, 2, 3)

    @property
    def name(self) -> str:
        """The name that people read, the same for all parts."""
        return f"sampler and encoder, {self.clips} x {self.frames}x{self.height}x{self.height}"

    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""
        return Subject(
            suite,
            case=self.name,
            op=PART,
            direction="forward+backward",
            clips=self.clips,
            tokens=self.size.num_tokens,
            visible=self.size.num_tokens // 20,
            dtype="float32",
            width=self.width,
            shape=f"{self.frames}x{self.height}x{self.height}",
        )

    def make(self) -> Step:
        """A function that does both passes on random input."""
        size = self.size
        count = size.num_tokens // 20 if self.implementation == "encoder" else size.num_tokens
        tokens = torch.randn(self.clips, count, self.width, requires_grad=True)
        inputs: Callable[[], Tensor] = lambda: tokens  # noqa: E731
        if self.implementation == "pixels":
            inputs = partial(ops.thumbnails, torch.randn(self.clips, *size.video))
        module = self._module(inputs)

        def both_ways() -> Tensor:
            x = inputs()
            loss = module(x).square().sum()
            torch.autograd.grad(loss, [*module.parameters(), *([x] if x.requires_grad else [])])
            return loss.detach()

        return both_ways

    def _module(self, inputs: Callable[[], Tensor]) -> nn.Module:
        if self.implementation == "encoder":
            return Encoder(self.size, self.width, self.depth, 12).blocks
        if self.implementation == "exact":
            return MHAScoreNetwork(self.width, self.size.num_tokens)
        return PooledScoreNetwork(inputs().shape[-1], self.size.grid)


def part_cases(clips: int, quick: bool) -> list[Part]:
    """The parts at every number of tokens."""
    tiny: dict[str, Any] = {"width": 48, "depth": 1} if quick else {}
    sizes = _QUICK_CLIPS if quick else _CLIPS
    return [Part(name, clips, frames, height, **tiny) for frames, height in sizes for name in _PARTS]
