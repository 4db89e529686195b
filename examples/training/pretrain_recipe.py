"""The settings of pre-training (the paper's supplement, Tables 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from adamae_sampler.losses import Estimator
from adamae_sampler.models import PRESETS
from training.recipe import Recipe

SAMPLER_SETTINGS = ("score_network", "sample_from", "temperature", "exploration")  # which a sampler's weights go with


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Settings of a pre-training run."""

    kind: ClassVar[str] = "pretrain"
    data_settings: ClassVar[tuple[str, ...]] = ("data",)
    shortcuts: ClassVar[dict[str, dict[str, Any]]] = {"fast": dict(PRESETS["fast"])}

    data: str = ""
    """Folder of videos, list file (`path label` or `path start frames label`), shards (their folder, or the path or URL
    of their index.json), or 'sprites'."""
    output: Path = Path("runs/pretrain")
    """Folder for metrics, checkpoints and pictures."""

    model: str = "pretrain_adamae_vit_base_patch16_224"
    """Model of timm's registry."""
    masking: Literal["adaptive", "random", "tube", "frame"] = "adaptive"
    """Rule that chooses the visible tokens."""
    mask_ratio: float = 0.95
    """Share of tokens that is masked."""
    score_network: Literal["mha", "mlp", "pooled"] = "mha"
    """The sampler's network: 'mha' is the paper's, 'pooled' attends to cells of tokens for far less."""
    sample_from: Literal["tokens", "pixels"] = "tokens"
    """Input of the sampler: tokens, or patches shrunk to 4 x 4 pixels; then only the visible tokens are embedded."""
    fast: bool = False
    """Train in less time than the paper's method: score_network pooled, sample_from pixels and decode_ratio 0.5."""
    temperature: float = 1.0
    """p = softmax(scores / temperature)."""
    exploration: float = 0.0
    """Share of p that is spread evenly over all tokens."""
    num_masks: int = 1
    """Masks of each clip, from one tokenization and one p; they multiply the batch from the encoder on."""
    decode_ratio: float = 1.0
    """Share of the masked tokens that is decoded."""
    fused_head: bool = True
    """Compute the decoder's last layer and the loss as one, a part at a time; the prediction is never held."""
    estimator: Estimator = "categorical"
    """Estimator of the sampler's gradient: 'categorical' is the paper's; 'plackett_luce' and 'plackett_luce_max' are
    the exact policy gradients that lower and raise the expected error."""
    graph: bool = False
    """Launch each step, optimizer included, as one CUDA graph, for small models whose steps wait for the host. On one
    GPU, in bf16 or fp32."""
    decoder_embed_dim: int | None = None
    """Width of the decoder; the model's own if None, as for the next two."""
    decoder_depth: int | None = None
    """Blocks of the decoder."""
    decoder_num_heads: int | None = None
    """Attention heads of the decoder."""

    normalize_target: bool = True
    """Predict pixels normalised per patch and channel (the paper's), or raw ones."""
    loss: Literal["mse", "l1"] = "mse"
    """Reconstruction error."""
    sampling_weight: float = 1e-4
    """Weight of the sampling loss."""

    epochs: float = 800
    """Passes over the data."""
    warmup_epochs: float = 40
    """Passes over which the learning rate rises."""
    batch_size: int = 32
    """Videos of one forward pass on one device; each gives `repeats` clips."""
    base_lr: float = 1.5e-4
    """Learning rate for an effective batch of 256; the one used is proportional."""
    min_base_lr: float = 1e-5
    """Learning rate at the end of the cosine, for an effective batch of 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(sampling_weight=0, num_masks=1)
        if self.masking != "adaptive" and self.estimator != "categorical":
            raise ValueError(
                f"estimator={self.estimator}: masking={self.masking} learns nothing. Leave it out, or mask adaptively."
            )

    def check_shortcuts(self) -> None:
        """Raises ValueError if --fast meets a setting that contradicts it, or a masking without a score network."""
        super().check_shortcuts()
        if self.fast and self.masking != "adaptive":
            raise ValueError(
                f"--masking {self.masking} has no score network, which --fast sets; leave one of them out."
            )

    def model_args(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model`, which leaves out those that are None."""
        decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decode_ratio", "fused_head")
        names = ("masking", "mask_ratio", "num_masks", *SAMPLER_SETTINGS, *decoder)
        return {**self.sizes(), **{name: getattr(self, name) for name in names}}

    def loss_args(self) -> dict[str, Any]:
        """Keyword arguments for `AdaMAELoss`."""
        same = ("sampling_weight", "patch_size", "tubelet_size", "estimator", "num_masks", "fused_head")
        return {"kind": self.loss, "normalize": self.normalize_target, **{name: getattr(self, name) for name in same}}
