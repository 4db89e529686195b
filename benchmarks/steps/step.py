"""Whole training steps: forward, losses, backward and AdamW, of the package and of the official formulation.

The package's step starts from uint8 video on the device, as `examples/pretrain.py` does; the official one from the fp32
video that its loader normalises. AdamW is fused in the package's step and torch's default in the other.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adamae_sampler import AdaMAELoss, FrameTokenSampler, RandomTokenSampler, TubeTokenSampler
from adamae_sampler.models import AdaMAE, load_checkpoint
from adamae_sampler.networks import Network
from adamae_sampler.sampler import Masking, TokenSampler
from adamae_sampler.transformer import Block
from benchmarks.core.rows import OFFICIAL, OURS, Subject
from benchmarks.core.worker import Worker
from benchmarks.ops.base import name_of
from benchmarks.ops.official import OfficialFormulation, official_loss

SampleFrom = Literal["tokens", "pixels"]
Compiled = Literal["", "whole", "blocks"]
Step = Callable[[], Tensor]  # returns the loss


class AnyStep(ABC):
    """A training step that can be measured; its subclasses are frozen dataclasses."""

    implementation: str

    @property
    def label(self) -> str:
        """The implementation's name in rows."""
        return self.implementation

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that people read, the same for all implementations."""

    @abstractmethod
    def make(self, device: torch.device) -> Step:
        """A function that does one step on random input, with weights and optimizer of its own."""

    @abstractmethod
    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""


_ADAMW = partial(torch.optim.AdamW, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
_RTOL = {"cpu": 1e-5, "cuda": 1e-4}  # of fp32 losses; a GPU's attention kernels sum in other orders


@dataclass(frozen=True)
class StepCase(AnyStep):
    """One training step.

    Attributes:
        masking: how tokens are masked.
        mask_ratio: share of tokens masked.
        clips: of a batch.
        implementation: "adamae_sampler" or "official".
        compiled: `torch.compile` of forward and losses as a "whole", or of the transformers' "blocks" one by one, which
            compiles faster, since equal blocks share their code.
        size: of the ViT.
        dtype: bfloat16 means autocast.
        img_size: height and width of a frame.
        num_frames: frames of a clip.
        depth: blocks of the encoder; those of the size if None.
        score_network: see `AdaMAE`, as for all that follow.
        sample_from: see there.
        num_masks: see there; `clips` are those of the video.
        decode_ratio: see there.
        fused_head: see there; on as in `examples/pretrain.py`.
    """

    masking: Masking = "adaptive"
    mask_ratio: float = 0.95
    clips: int = 256
    implementation: str = OURS
    compiled: Compiled = ""
    size: Literal["small", "base", "large"] = "base"
    dtype: torch.dtype = torch.bfloat16
    img_size: int = 224
    num_frames: int = 16
    depth: int | None = None
    score_network: Network = "mha"
    sample_from: SampleFrom = "tokens"
    num_masks: int = 1
    decode_ratio: float = 1.0
    fused_head: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The model's arguments that differ from the paper's method."""
        names = ("score_network", "sample_from", "num_masks", "decode_ratio", "fused_head")
        usual = {each.name: each.default for each in fields(StepCase)}
        return {name: value for name in names if (value := getattr(self, name)) != usual[name]}

    @property
    def video_shape(self) -> tuple[int, int, int, int, int]:
        """[B, 3, T, H, W]."""
        return self.clips, 3, self.num_frames, self.img_size, self.img_size

    @property
    def name(self) -> str:
        """The name that people read, the same for all implementations."""
        depth = "" if self.depth is None else f" of depth {self.depth}"
        video = f"{self.clips} x {self.num_frames}x{self.img_size}x{self.img_size}"
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        name = f"ViT-{self.size[0].upper()}{depth}, {self.masking} {self.mask_ratio:.0%}"
        return f"{name}, {video}, {name_of(self.dtype)}{options}"

    @property
    def label(self) -> str:
        """The implementation's name in rows, and how it is compiled."""
        if self.compiled == "blocks":
            return f"{self.implementation}, blocks compiled"
        return f"{self.implementation} compiled" if self.compiled else self.implementation

    @property
    def is_official_method(self) -> bool:
        """Whether this is the package's step for what the official formulation computes."""
        paper = (self.implementation, self.size, self.masking) == (OURS, "base", "adaptive")
        return paper and not self.options

    def make(self, device: torch.device) -> Step:
        """See `AnyStep`."""
        model, forward = (our_forward if self.implementation == OURS else _official_forward)(self, device)
        if self.compiled == "whole":
            forward = torch.compile(forward, fullgraph=self.implementation == OURS, dynamic=False)
        if self.compiled == "blocks":
            for block in filter(lambda module: isinstance(module, Block), model.modules()):
                block.compile(fullgraph=True, dynamic=False)
        # Capturable, so that a CUDA graph can hold the whole step.
        options: dict[str, Any] = {"fused": True, "capturable": device.type == "cuda"}
        optimizer = _ADAMW(model.parameters(), **(options if self.implementation == OURS else {}))

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = forward()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""
        sampler = self.fixed_sampler()
        return Subject(
            suite,
            case=self.name,
            op=f"training step of ViT-{self.size[0].upper()}, {self.masking} {self.mask_ratio:.0%}"
            + "".join(f", {name}={value}" for name, value in self.options.items()),
            direction="step",
            clips=self.clips,
            tokens=sampler.num_tokens,
            visible=sampler.num_visible,
            dtype=name_of(self.dtype),
            shape=f"{self.num_frames}x{self.img_size}x{self.img_size}",
        )

    def fixed_sampler(self) -> TokenSampler:
        """A sampler without weights that leaves as many tokens visible."""
        grid = (self.num_frames // 2, self.img_size // 16, self.img_size // 16)
        kinds = {"tube": TubeTokenSampler, "frame": FrameTokenSampler}
        return kinds.get(self.masking, RandomTokenSampler)(grid, self.mask_ratio)


def our_forward(case: StepCase, device: torch.device) -> tuple[nn.Module, Step]:
    """The package's model, and a function from random video to the loss."""
    model, criterion = our_model(case, device), AdaMAELoss(num_masks=case.num_masks, fused_head=case.fused_head)
    video = torch.randint(256, case.video_shape, dtype=torch.uint8, device=device)

    def forward() -> Tensor:
        prediction, sample = model(video)
        loss: Tensor = criterion(prediction, video, sample).loss
        return loss

    return model, forward


def _official_forward(case: StepCase, device: torch.device) -> tuple[nn.Module, Step]:
    model = official_model(case).to(device)  # its position tables stay on the CPU and travel at each step
    video = torch.randn(case.video_shape, device=device)

    def forward() -> Tensor:
        prediction, probs, mask = model(video)
        return official_loss(prediction, video, probs, mask)[0]

    return model, forward


def our_model(case: StepCase, device: torch.device) -> AdaMAE:
    """The package's model, in training mode."""
    with device:  # filling the weights there takes no time
        model: AdaMAE = timm.create_model(
            f"pretrain_adamae_vit_{case.size}_patch16_224",
            img_size=case.img_size,
            num_frames=case.num_frames,
            mask_ratio=case.mask_ratio,
            masking=case.masking,
            **{**case.options, "fused_head": case.fused_head},
            **({} if case.depth is None else {"depth": case.depth}),
        )
    return model


def official_model(case: StepCase) -> OfficialFormulation:
    """The official formulation, on the CPU, in training mode.

    Raises:
        ValueError: not ViT-B with adaptive masking.
    """
    if (case.size, case.masking) != ("base", "adaptive"):
        raise ValueError(f"{case.name}: the official formulation is ViT-B with adaptive masking.")
    return OfficialFormulation(case.img_size, case.num_frames, depth=case.depth or 12, mask_ratio=case.mask_ratio)


def check_step(case: StepCase, device: torch.device) -> None:
    """Raises AssertionError unless the package and the official formulation give the same losses and gradients.

    On the same weights, video and mask, in fp32, without dropout.
    """
    torch.manual_seed(0)
    baseline, ours = official_model(case).to(device).eval(), our_model(case, device).eval()
    load_checkpoint(ours, baseline.state_dict())
    video = torch.randn(case.video_shape, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        prediction, probs, mask = baseline(video)
        wanted = official_loss(prediction, video, probs, mask)
        wanted[0].backward()
        prediction, sample = ours(video, mask=mask)
        got = AdaMAELoss(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)(prediction, video, sample)
        got.loss.backward()
    torch.testing.assert_close(got[:3], wanted, rtol=_RTOL[device.type], atol=0)
    wanted_grads = copy.deepcopy(ours)
    load_checkpoint(wanted_grads, {name: each.grad for name, each in baseline.named_parameters()})
    for (name, mine), theirs in zip(ours.named_parameters(), wanted_grads.parameters(), strict=True):
        if mine.grad is None:
            raise AssertionError(f"{case.name}: {name} has no gradient.")
        difference, size = float((mine.grad - theirs.detach()).norm()), float(theirs.detach().norm())
        if not difference <= max(10 * _RTOL[device.type] * size, 1e-8):  # what only shifts all scores has none
            raise AssertionError(f"{case.name}: gradients of {name} differ by {difference:.1e}, of {size:.1e}.")


def matrix_flops(case: StepCase, device: torch.device) -> int:
    """Floating-point operations of a step's matrix products, which the method needs in any formulation."""
    one_clip = replace(case, clips=1, implementation=OFFICIAL, dtype=torch.float32)
    step = one_clip.make(device)
    with FlopCounterMode(display=False) as counter:
        step()
    return case.clips * counter.get_total_flops()


def require_finite(loss: float, case: AnyStep) -> None:
    """Raises FloatingPointError if a step that was timed did not train."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{case.name}, {case.label}: the loss is {loss}.")


@contextmanager
def cpu_clocks(cases: Sequence[AnyStep]) -> Iterator[dict[AnyStep, Callable[[], float]]]:
    """For each case a function that does one step and returns its seconds.

    Each runs in a process of its own, since a heap that another model has used is slower or faster.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        workers = {case: stack.enter_context(Worker()) for case in cases}
        seconds = {case: worker.stream(_step_seconds, case, threads, limit_s=None) for case, worker in workers.items()}
        yield {case: partial(next, each) for case, each in seconds.items()}


def _step_seconds(case: AnyStep, threads: int) -> Iterator[float]:
    torch.set_num_threads(threads)
    step = case.make(torch.device("cpu"))
    while True:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        require_finite(float(loss), case)
        yield seconds
