"""Pictures of the masks and predictions of a pre-trained model: the paper's Figures 2 to 14 for any video.

    python examples/visualize_masks.py --checkpoint runs/demo/model.safetensors --video examples/clips/bigbuckbunny.mp4
    python examples/visualize_masks.py --checkpoint checkpoint.pth --video clip.webm --mask-ratios 0.95 --leak-free

For a mask ratio of 0.95 the script writes overview_95.png (video, prediction, error, p, mask) and animation_95.gif or
.mp4 (the same, frame by frame). masks.png shows the video, p and the masks of all ratios. A prediction of normalised
pixels takes brightness and contrast from the true patch, and its label says so. --leak-free takes them from the visible
patches.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adamae_sampler import AdaMAELoss, MaskSample
from adamae_sampler.mask import check_mask_ratio
from adamae_sampler.models import AdaMAE, load_checkpoint
from adamae_sampler.networks import Network
from adamae_sampler.sampler import MASKINGS, Masking, MotionTokenSampler, ScoredTokenSampler, settings_of
from adamae_sampler.visualize import animation, mask_overview, overview, save_animation
from common.command_line import checkpoint_of, parse_settings
from common.devices import autocast, make_accelerator
from common.models import AUTOENCODERS, create_model, stated_recipe, stated_sizes
from common.report import check_output
from common.settings import DECODER_SIZES, EncoderSettings
from training.pretrain_recipe import SAMPLER_SETTINGS
from video_data.datasets import find_sprites
from video_data.video import VideoError
from video_data.video_lists import VideoEntry
from video_data.views import VideoViews


@dataclass(frozen=True, kw_only=True)
class Options(EncoderSettings):
    """Settings of the pictures. A file of pretrain.py gives the defaults of the model, the masking and the target."""

    checkpoint: str = ""
    """Pre-trained weights, with the decoder."""
    video: str = ""
    """Video file, or 'sprites:NUMBER:SEED' for a generated clip."""
    output: Path = Path("runs/pictures")
    """Folder for the pictures."""
    model: str = "pretrain_adamae_vit_base_patch16_224"
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


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        checkpoint = checkpoint_of(arguments)
        said, sizes = stated_recipe(checkpoint), stated_sizes(checkpoint)
        start = replace(Options(), **{name: sizes[name] for name in DECODER_SIZES if name in sizes})
        target = ("masking", *SAMPLER_SETTINGS, "normalize_target", "loss", "stride", "sampling")
        start = replace(start, **{name: said[name] for name in target if name in said})
        run(parse_settings(start, arguments, __doc__))
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


@torch.no_grad()
def run(options: Options) -> None:
    """Writes the pictures; raises ValueError, TypeError, FileNotFoundError or VideoError if it cannot."""
    check_output(options.output)
    if not options.checkpoint or not options.video:
        raise ValueError("--checkpoint and --video are needed: pre-trained weights and a video file.")
    if "num_classes" in stated_sizes(options.checkpoint):
        raise ValueError(
            f"{options.checkpoint} is a classifier and has no decoder; pictures need a file of pretrain.py."
        )
    for ratio in options.mask_ratios:
        check_mask_ratio(ratio)
    accelerator = make_accelerator(options.precision)
    if not accelerator.is_main_process:
        return
    device = accelerator.device
    video = read_clip(options)[None].to(device)  # [1, C, T, H, W]
    options.output.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {"patch_size": options.patch_size, "tubelet_size": options.tubelet_size}
    statistics = "visible" if options.leak_free else "true"
    shown: dict[str, Any] = {"normalize": options.normalize_target, "statistics": statistics, **sizes}
    criterion = AdaMAELoss(kind=options.loss, normalize=options.normalize_target, **sizes)
    samples: dict[str, MaskSample] = {}
    for ratio in options.mask_ratios:
        model = build(options, ratio, report=not samples).to(device).eval()
        generator = torch.Generator(device).manual_seed(options.seed)
        with autocast(accelerator):
            prediction, sample = model(video, generator=generator)
        out = criterion(prediction, video, sample)
        if isinstance(model.sampler, MotionTokenSampler):  # its p is shown, and trained by no loss
            sample = sample._replace(log_probs=model.sampler.log_probs(model.sampler_tokens(video), video))
        name = f"{100 * ratio:g}"
        # Whole places and whole time steps hide fewer tokens than the ratio asks.
        samples[f"ratio {name}%\n{sample.num_visible} of {sample.num_tokens}\ntokens visible"] = sample
        figure = overview(video, prediction, sample, out.token_error, **shown)
        figure.savefig(options.output / f"overview_{name}.png", dpi=options.dpi)
        if options.animate != "none":
            frames = animation(video, prediction, sample, out.token_error, **shown)
            save_animation(frames, options.output / f"animation_{name}.{options.animate}")
        tokens = f"{sample.num_visible} of {sample.num_tokens} tokens visible"
        print(f"mask ratio {name}%: {tokens}, error {out.reconstruction:.4f}")
    mask_overview(video, samples, **sizes).savefig(options.output / "masks.png", dpi=options.dpi)
    print(f"wrote {', '.join(sorted(path.name for path in options.output.iterdir()))} to {options.output}")


def read_clip(options: Options) -> Tensor:
    """The clip in the middle of the video, [C, T, H, W] uint8."""
    sprites = find_sprites(options.video, options)
    if sprites is not None:
        last: Tensor = sprites[len(sprites) - 1]["video"]
        return last
    entry = VideoEntry(Path(options.video), where=options.video)
    source = VideoViews([entry], options.num_frames, options.stride, options.img_size, options.sampling)
    clip: Tensor = source.views(0)["video"][0]
    return clip


def build(options: Options, ratio: float, report: bool) -> AdaMAE:
    """The model at a mask ratio, with its weights."""
    decoder = {name: getattr(options, name) for name in DECODER_SIZES}
    settings = ("sample_from", *settings_of(options.masking))
    sampler = {name: getattr(options, name) for name in settings if name in SAMPLER_SETTINGS}
    masking: dict[str, Any] = {"masking": options.masking, "mask_ratio": ratio, **sampler}
    model: AdaMAE = create_model(options.model, AUTOENCODERS, **options.sizes(), **decoder, **masking)
    found = load_checkpoint(model, options.checkpoint)
    if any(name.startswith("sampler.") for name in found.missing):
        fixed = [name for name, kind in MASKINGS.items() if not issubclass(kind, ScoredTokenSampler)]
        raise ValueError(
            f"{options.checkpoint} has no sampler for --masking {options.masking}; choose --masking "
            f"{', '.join(fixed[:-1])} or {fixed[-1]}."
        )
    if report:
        print(f"{options.checkpoint}: {found}")
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
