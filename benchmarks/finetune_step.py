"""A training step of the classifier: all tokens of a clip, where pre-training's encoder sees the visible ones alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rows import OURS, Subject
from steps import Step
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.nn.functional import cross_entropy

from adamae_sampler.models import VideoClassifier

_CLASSES = 400


@dataclass(frozen=True)
class FinetuneStep:
    """Forward, cross-entropy, backward and AdamW with layer-wise decay of ViT-B, on 16x224x224 clips.

    Attributes:
        clips: of a batch.
        dtype: bfloat16 means autocast.
    """

    clips: int
    dtype: torch.dtype = torch.float32
    implementation: str = OURS
    compiled: bool = False
    repository: Path | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"ViT-B, fine-tuning, {self.clips} x 16x224x224, {str(self.dtype).removeprefix('torch.')}"

    @property
    def label(self) -> str:
        """The implementation as rows name it."""
        return self.implementation

    def make(self, device: torch.device) -> Step:
        """A function that does one step on random video."""
        with device:
            model: VideoClassifier = timm.create_model(
                "adamae_vit_base_patch16_224", num_classes=_CLASSES, drop_path_rate=0.1
            )
        groups = param_groups_layer_decay(model, 0.05, layer_decay=0.75)
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True, capturable=device.type == "cuda")
        video = torch.randint(256, (self.clips, 3, 16, 224, 224), dtype=torch.uint8, device=device)
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
        """The case as rows know it."""
        return Subject(
            suite,
            case=self.name,
            op="training step of ViT-B, fine-tuning",
            direction="step",
            clips=self.clips,
            tokens=1568,
            visible=1568,
            dtype=str(self.dtype).removeprefix("torch."),
            shape="16x224x224",
        )
