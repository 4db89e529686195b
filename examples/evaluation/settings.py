"""The settings of probes, features and pictures. They are read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.choices import Autoencoder, Classifier, Masking, Network
from common.settings import EncoderSettings, listed

Pool = Literal["mean", "none"]
ProbeKind = Literal["linear", "attentive"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(EncoderSettings):
    """Settings of the scripts that use a frozen encoder."""

    checkpoint: str = ""
    """Weights of the encoder: official AdaMAE or VideoMAE, Hugging Face VideoMAE, or a file of pretrain.py or
    finetune.py."""
    model: Classifier = "adamae_vit_base_patch16_224"
    """Name of the model in timm's registry."""
    clips: int = 1
    """Clips of each video; their features are averaged."""
    crops: int = 1
    """Crops of each clip; their features are averaged."""
    batch_size: int = 16
    """Videos of one forward pass, each with all its views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(clips=1, crops=1, batch_size=1)

    def need_checkpoint(self) -> str:
        """The checkpoint; raises ValueError if there is none."""
        if not self.checkpoint:
            raise ValueError("--checkpoint is needed: the weights of an encoder.")
        return self.checkpoint


@dataclass(frozen=True)
class ProbeRecipe:
    """The training settings of a probe. Those of a linear probe are VideoMAE's (its paper's appendix)."""

    epochs: int = 100
    """Passes over the features."""
    batch_size: int | None = None
    """Videos of one step, at most all. None: 1024 for a linear probe, 256 for an attentive probe."""
    base_lr: float | None = None
    """Learning rate for batches of 256 videos; it is scaled by batch / 256. It rises over a tenth of the epochs, then
    falls to 0 by a cosine. None: 0.1 for a linear probe (SGD with momentum 0.9, no weight decay), 1e-3 for an attentive
    probe (AdamW)."""

    def __post_init__(self) -> None:
        positive = all(each is None or each > 0 for each in (self.batch_size, self.base_lr))
        if self.epochs < 1 or not positive:
            raise ValueError(f"{self}: expected epochs and batch_size of 1 or more, and base_lr above 0.")


@listed
@dataclass(frozen=True, kw_only=True)
class ExtractionSettings(FeatureSettings):
    """Settings of the extraction."""

    data: str = ""
    """Folder of videos, list file, shards, or 'sprites:LENGTH:SEED'."""
    output: Path = Path("features.safetensors")
    """File to write, .safetensors or .npz."""
    pool: Pool = "mean"
    """'mean': the mean of the tokens, averaged over the views. 'none': all tokens of one view."""


@listed
@dataclass(frozen=True, kw_only=True)
class ProbeSettings(FeatureSettings):
    """Settings of a probe."""

    train: str = ""
    """List of training videos, shards, or 'sprites:LENGTH:SEED'."""
    val: str = ""
    """List of videos for evaluation, shards, or 'sprites:LENGTH:SEED'."""
    output: Path = Path("runs/probe")
    """Folder for the results."""
    cache: Path = Path("runs/features")
    """Folder of the cached features."""
    random_clips: int = 0
    """Random clips of each training video, of random frames and with a MultiScaleCrop; each epoch takes one of them.
    0: the views of --clips and --crops, averaged, as for evaluation."""
    kind: ProbeKind = "linear"
    """'linear': batch norm without affine parameters, then a linear layer, on the mean of the tokens. 'attentive': the
    same on all tokens, pooled by a learned query."""
    probe: ProbeRecipe = field(default_factory=ProbeRecipe)
    """The training settings of the probe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(random_clips=0)


@listed
@dataclass(frozen=True, kw_only=True)
class PictureSettings(EncoderSettings):
    """Settings of the pictures. A file of pretrain.py gives the defaults of the model, the masking and the target."""

    checkpoint: str = ""
    """Pre-trained weights, with the decoder."""
    video: str = ""
    """Video file, or 'sprites:NUMBER:SEED' for a generated clip."""
    output: Path = Path("runs/pictures")
    """Folder for the pictures."""
    model: Autoencoder = "pretrain_adamae_vit_base_patch16_224"
    """Name of the model in timm's registry."""
    decoder_embed_dim: int | None = None
    """Width of the decoder; None keeps the model's own."""
    decoder_depth: int | None = None
    """Number of blocks of the decoder; None keeps the model's own."""
    decoder_num_heads: int | None = None
    """Number of attention heads of the decoder; None keeps the model's own."""
    masking: Masking = "adaptive"
    """Rule that chooses the visible tokens."""
    score_network: Network = "mha"
    """The sampler's network. Needed for weights whose file does not state it, as are its sizes."""
    score_depth: int | None = None
    """Blocks of the score network; None for 1."""
    score_width: int | None = None
    """Width of these blocks; None for the encoder's, or 192 for 'pooled'."""
    sample_from: Literal["tokens", "pixels"] = "tokens"
    """Input of the sampler."""
    temperature: float = 1.0
    """p = softmax(scores / temperature)."""
    exploration: float = 0.0
    """Share of p that is spread evenly over all tokens."""
    mask_ratios: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95)
    """Shares of tokens to mask; each gets a picture."""
    normalize_target: bool = True
    """Whether the model predicts pixels normalised per patch and channel; else it predicts raw pixels."""
    loss: Literal["mse", "l1"] = "mse"
    """Reconstruction error that the pictures show."""
    leak_free: bool = False
    """Show normalised predictions with the brightness and contrast of visible patches, not of the true patches."""
    animate: Literal["gif", "mp4", "none"] = "gif"
    """Format of the animations."""
    dpi: int = 80
    """Resolution of the pictures, in dots per inch."""
