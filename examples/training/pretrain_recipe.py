"""The settings of pre-training (the paper's supplement, Tables 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.choices import FAST, SCORED_MASKINGS, Autoencoder, Estimator, Masking, Network
from common.settings import DECODER_SIZES, listed
from training.recipe import Recipe

# A sampler's weights fit only these.
SAMPLER_SETTINGS = ("score_network", "score_depth", "score_width", "sample_from", "temperature", "exploration")


@listed
@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Recipe):
    """Settings of a pre-training run."""

    kind: ClassVar[str] = "pretrain"
    data_settings: ClassVar[tuple[str, ...]] = ("data",)
    shortcuts: ClassVar[dict[str, dict[str, Any]]] = {"fast": FAST}

    data: str = ""
    """Training videos: a folder, a list file (lines `path label` or `path start frames label`), shards (a folder, or
    the path or URL of an index.json), or 'sprites'."""
    output: Path = Path("runs/pretrain")
    """Folder for metrics, checkpoints and pictures."""

    model: Autoencoder = "pretrain_adamae_vit_base_patch16_224"
    """Name of the model in timm's registry."""
    masking: Masking = "adaptive"
    """Rule that chooses the visible tokens."""
    mask_ratio: float = 0.95
    """Share of the tokens that is masked."""
    score_network: Network = "mha"
    """The network of adaptive and hard masking. 'mha' is the paper's. 'mlp_linear' is the MLP of its Figure 1a, 'mlp'
    has a GELU between the layers. 'pooled' attends to cells of tokens, which costs far less."""
    score_depth: int | None = None
    """Blocks of the score network; None for 1. The paper's ablation has --score-depth 2 --score-width 384."""
    score_width: int | None = None
    """Width of these blocks, a multiple of 8 (3 for 'pooled'); None for the encoder's, or 192 for 'pooled'."""
    sample_from: Literal["tokens", "pixels"] = "tokens"
    """Input of the sampler. 'tokens': the embedded tokens. 'pixels': patches shrunk to 4 x 4 pixels; the model then
    embeds only the visible tokens."""
    fast: bool = False
    """Train faster than the paper's method: sets score_network pooled, sample_from pixels and decode_ratio 0.5."""
    temperature: float = 1.0
    """p = softmax(scores / temperature)."""
    exploration: float = 0.0
    """Share of p that is spread evenly over all tokens."""
    num_masks: int = 1
    """Masks drawn for each clip from one p. The encoder and decoder see num_masks times the batch."""
    decode_ratio: float = 1.0
    """Share of the masked tokens that the decoder reconstructs."""
    target_ratio: float = 0.0
    """Share of the tokens that are set aside at random before a draw: never visible, and alone reconstructed. With
    --estimator plackett_luce a token is then shown only if it helps to predict others."""
    fused_head: bool = True
    """Compute the decoder's last layer and the loss together in parts, so the whole prediction is never in memory."""
    estimator: Estimator = "categorical"
    """Estimator of the sampler's gradient. 'categorical' is the paper's. The other two are exact policy gradients:
    'plackett_luce' lowers the expected error of what is reconstructed, 'plackett_luce_max' raises it."""
    graph: bool = False
    """Launch each step, optimizer included, as one CUDA graph. It helps small models, whose steps wait for the host. It
    needs a single GPU and bf16 or fp32."""
    decoder_embed_dim: int | None = None
    """Width of the decoder; None keeps the model's own."""
    decoder_depth: int | None = None
    """Number of blocks of the decoder; None keeps the model's own."""
    decoder_num_heads: int | None = None
    """Number of attention heads of the decoder; None keeps the model's own."""

    normalize_target: bool = True
    """Predict pixels normalised per patch and channel, as the paper does; else raw pixels."""
    loss: Literal["mse", "l1"] = "mse"
    """Reconstruction error."""
    sampling_weight: float = 1e-4
    """Weight of the sampling loss; with hard masking, of the ranking loss."""

    epochs: float = 800
    """Epochs of training."""
    warmup_epochs: float = 40
    """Epochs over which the learning rate rises."""
    batch_size: int = 32
    """Videos of one forward pass on one device; each gives `repeats` clips."""
    base_lr: float = 1.5e-4
    """Learning rate for an effective batch of 256 videos; it is scaled by effective_batch / 256."""
    min_base_lr: float = 1e-5
    """Final learning rate of the cosine, for an effective batch of 256; scaled likewise."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    picture_every: int = 1000
    """Steps between two pictures of a clip's p, mask and prediction, for TensorBoard and the tracker; 0 for none."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 for no clipping, as the official code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(sampling_weight=0, num_masks=1, picture_every=0)
        if self.masking != "adaptive" and self.estimator != "categorical":
            raise ValueError(
                f"estimator={self.estimator} has no effect: masking={self.masking} learns no p. Leave one of them out."
            )

    def check_sizes(self) -> None:
        """Raises ValueError if patches do not divide clips, heads a width, or the mask ratio is not a share."""
        super().check_sizes()
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio={self.mask_ratio}, expected a share strictly between 0 and 1, such as 0.95 to mask 95%."
            )

    def check_shortcuts(self) -> None:
        """Raises ValueError if --fast is on and a setting contradicts it, or the masking has no score network."""
        super().check_shortcuts()
        if self.fast and self.target_ratio:
            raise ValueError(
                f"--target-ratio {self.target_ratio} contradicts --fast, which decodes half of what is masked. For the "
                f"rest of --fast use --score-network pooled --sample-from pixels --target-ratio {self.target_ratio}."
            )
        if self.fast and self.masking not in SCORED_MASKINGS:
            raise ValueError(
                f"--fast sets a score network, and --masking {self.masking} has none; leave one of them out."
            )

    def model_args(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model`, which ignores arguments of None."""
        decoder = (*DECODER_SIZES, "decode_ratio", "target_ratio", "fused_head")
        names = ("masking", "mask_ratio", "num_masks", *SAMPLER_SETTINGS, *decoder)
        return {**self.sizes(), **{name: getattr(self, name) for name in names}}

    def loss_args(self) -> dict[str, Any]:
        """Keyword arguments for `AdaMAELoss`."""
        same = ("sampling_weight", "patch_size", "tubelet_size", "estimator", "num_masks", "fused_head")
        return {"kind": self.loss, "normalize": self.normalize_target, **{name: getattr(self, name) for name in same}}
