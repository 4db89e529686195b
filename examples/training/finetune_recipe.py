"""The settings of fine-tuning: the paper's supplement, Table 7; other defaults are VideoMAE's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common.choices import Classifier
from common.settings import listed
from training.recipe import Recipe


@listed
@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Settings of a fine-tuning run and of its evaluation."""

    kind: ClassVar[str] = "finetune"
    data_settings: ClassVar[tuple[str, ...]] = ("train", "val")

    train: str = ""
    """List of training videos (`path label` or `path start frames label`), shards, or 'sprites[:LENGTH[:SEED]]'."""
    val: str = ""
    """List of videos for evaluation, shards, or 'sprites[:LENGTH[:SEED]]'."""
    checkpoint: str = ""
    """Pre-trained weights: official AdaMAE or VideoMAE, Hugging Face VideoMAE, or a file of pretrain.py. Without it the
    model starts from scratch."""
    output: Path = Path("runs/finetune")
    """Folder for metrics, weights and results."""

    eval_only: bool = False
    """Evaluate the classifier in --checkpoint, without training."""

    model: Classifier = "adamae_vit_base_patch16_224"
    """Name of the model in timm's registry."""
    num_classes: int | None = None
    """Number of classes; None: one more than the largest label."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block; the rate rises linearly from 0 at the first block."""
    head_dropout: float = 0.0
    """Dropout before the head."""
    head_init_scale: float = 1e-3
    """Factor on the head's initial weights."""

    randaugment: str = "rand-m7-n4-mstd0.5-inc1"
    """timm's name of a RandAugment, applied alike to all frames; empty for none."""
    erasing: float = 0.25
    """Share of clips in which a box is replaced by noise (random erasing)."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 for none."""

    epochs: float = 50
    """Epochs of training."""
    warmup_epochs: float = 5
    """Epochs over which the learning rate rises."""
    batch_size: int = 8
    """Videos of one forward pass on one device; each gives `repeats` clips."""
    base_lr: float = 5e-4
    """Learning rate for an effective batch of 256 videos; it is scaled by effective_batch / 256."""
    min_base_lr: float = 1e-6
    """Final learning rate of the cosine, for an effective batch of 256; scaled likewise."""
    layer_decay: float = 0.75
    """Learning rate of a layer divided by the learning rate of the layer above."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 for no clipping."""
    ema: float | None = None
    """Decay of a moving average of the weights; the average is evaluated and saved. None for no average."""

    eval_every: int = 1
    """Epochs between two evaluations with one view; 0 evaluates only at the end."""
    eval_batch_size: int = 4
    """Videos of one forward pass in evaluation, each with all its views."""
    test_clips: int = 5
    """Clips of a video in the evaluation at the end."""
    test_crops: int = 3
    """Crops of a clip in the evaluation at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(
            num_classes=2, drop_path=0, head_dropout=0, head_init_scale=0, erasing=0, smoothing=0, mixup=0,
            cutmix=0, layer_decay=0, ema=0, eval_every=0, eval_batch_size=1, test_clips=1, test_crops=1,
        )  # fmt: skip
        self.check_most(drop_path=1, head_dropout=1, erasing=1, smoothing=1, layer_decay=1, ema=1 - 1e-9)
        if (self.mixup or self.cutmix) and self.batch_size * self.repeats % 2:
            raise ValueError(
                f"batch_size x repeats = {self.batch_size} x {self.repeats} is odd, but mixup takes pairs of clips. "
                "Change either number, or set mixup and cutmix to 0."
            )

    def model_args(self, num_classes: int) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model`, which ignores arguments of None."""
        return {
            **self.sizes(),
            "num_classes": num_classes,
            "drop_path_rate": self.drop_path,
            "drop_rate": self.head_dropout,
            "head_init_scale": self.head_init_scale,
        }
