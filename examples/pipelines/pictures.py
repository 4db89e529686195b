"""Pictures of a pre-trained model on a video. `visualize_masks.py` is their command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamae_sampler import AdaMAELoss, MaskSample
from adamae_sampler.mask import check_mask_ratio
from adamae_sampler.models import AdaMAE, load_checkpoint
from adamae_sampler.sampler import MASKINGS, MotionTokenSampler, ScoredTokenSampler, settings_of
from adamae_sampler.visualize import animation, mask_overview, overview, save_animation
from common.checkpoint_header import stated_sizes
from common.devices import autocast, make_accelerator
from common.models import AUTOENCODERS, create_model
from common.report import check_output
from common.settings import DECODER_SIZES
from evaluation.settings import PictureSettings
from training.pretrain_recipe import SAMPLER_SETTINGS
from video_data.datasets import find_sprites
from video_data.sprites import Sprites
from video_data.video_lists import VideoEntry
from video_data.views import VideoViews


@torch.no_grad()
def run(options: PictureSettings) -> None:
    """Writes the pictures; raises ValueError, TypeError, FileNotFoundError or VideoError if it cannot."""
    numbers = [f"{100 * ratio:g}" for ratio in options.mask_ratios]
    animations = [f"animation_{number}.{options.animate}" for number in numbers if options.animate != "none"]
    check_output(options.output, "masks.png", *(f"overview_{number}.png" for number in numbers), *animations)
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


def read_clip(options: PictureSettings) -> Tensor:
    """The clip in the middle of the video, [C, T, H, W] uint8."""
    sprites = find_sprites(options.video, options)
    if sprites is not None:
        last: Tensor = Sprites.of(sprites)[sprites.length - 1]["video"]
        return last
    entry = VideoEntry(Path(options.video), where=options.video)
    source = VideoViews([entry], options.num_frames, options.stride, options.img_size, options.sampling)
    clip: Tensor = source.views(0)["video"][0]
    return clip


def build(options: PictureSettings, ratio: float, report: bool) -> AdaMAE:
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
