"""A training step of the classifier, whose encoder sees all tokens of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.nn.functional import cross_entropy

from adamae_sampler.models import VideoClassifier
from benchmarks.core.rows import OURS, Subject
from benchmarks.ops.base import name_of
from benchmarks.steps.step import AnyStep, Step

_CLASSES = 400


@dataclass(frozen=True)
class FinetuneStep(AnyStep):
    """Forward, cross-entropy, backward and AdamW with layer-wise decay of ViT-B, on 16x224x224 clips.

    Attributes:
        clips: of a batch.
        dtype: bfloat16 means autocast.
        img_size: height and width of a frame.
        depth: blocks of the encoder; ViT-B's if None.
    """

    clips: int
    dtype: torch.dtype = torch.float32
    img_size: int = 224
    depth: int | None = None
    implementation: str = OURS

    @property
    def name(self) -> str:
        """The name that people read."""
        depth = "" if self.depth is None else f" of depth {self.depth}"
        return f"ViT-B{depth}, fine-tuning, {self.clips} x {self.shape}, {name_of(self.dtype)}"

    @property
    def shape(self) -> str:
        """Frames, height and width of a clip."""
        return f"16x{self.img_size}x{self.img_size}"

    def make(self, device: torch.device) -> Step:
        """See `AnyStep`."""
        with device:
            model: VideoClassifier = timm.create_model(
                "adamae_vit_base_patch16_224",
                num_classes=_CLASSES,
                drop_path_rate=0.1,
                img_size=self.img_size,
                **({} if self.depth is None else {"depth": self.depth}),
            )
        groups = param_groups_layer_decay(model, 0.05, layer_decay=0.75)
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True, capturable=device.type == "cuda")
        video = torch.randint(256, (self.clips, 3, 16, self.img_size, self.img_size), dtype=torch.uint8, device=device)
        target = torch.randint(_CLASSES, (self.clips,), device=device)

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = model(video.float() / 255)
            loss = cross_entropy(logits.float(), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def subject(self, suite: str) -> Subject:
        """The case's fields in rows."""
        tokens = 8 * (self.img_size // 16) ** 2
        return Subject(
            suite,
            case=self.name,
            op="training step of ViT-B, fine-tuning",
            direction="step",
            clips=self.clips,
            tokens=tokens,
            visible=tokens,
            dtype=name_of(self.dtype),
            shape=self.shape,
        )
