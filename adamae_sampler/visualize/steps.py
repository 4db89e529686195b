"""What a picture shows: the tensors of one step, of a model or given, and pixels in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from adamae_sampler.integrations.host import AdaptiveHost
from adamae_sampler.losses import AdaMAELoss
from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.patches import join_patches
from adamae_sampler.ops.target import STD_EPS, target_rows

Statistics = Literal["true", "visible"]


class Step(NamedTuple):
    """The tensors of a step.

    Attributes:
        video: [B, C, T, H, W].
        prediction: [B, M, P]; None if it is not known how the model lays it out.
        sample: the mask.
        token_error: [B, M], the error of each masked token.
        patches: how the video is cut and normalised.
    """

    video: Tensor
    prediction: Tensor | None
    sample: MaskSample
    token_error: Tensor
    patches: PatchFormat


@torch.no_grad()
def step_of_model(
    model: nn.Module, inputs: Tensor, criterion: AdaMAELoss | None = None, generator: torch.Generator | None = None
) -> Step:
    """Runs a model in evaluation mode, and leaves it as it was. See `overview`."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if isinstance(model, AdaptiveHost):
            return _step_of_host(model, inputs, criterion, generator)
        return _step_of_own_model(model, inputs, criterion, generator)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _step_of_host(
    host: AdaptiveHost, inputs: Tensor, criterion: AdaMAELoss | None, generator: torch.Generator | None
) -> Step:
    sample = host.draw_mask(inputs, generator)
    video = host.as_video(inputs)
    if not host.computes_loss:
        prediction, sample = host(inputs, mask=sample)
        return _judged(host, video, prediction, sample, criterion)
    if criterion is not None:
        raise ValueError(f"{type(host).__name__} computes its own loss; leave the criterion out.")
    grid = host.grid_of(inputs) or host.sampler.grid_size
    sizes = zip(video.shape[2:], grid, strict=True)
    patches = PatchFormat(tuple(side // tokens for side, tokens in sizes))  # type: ignore[arg-type]
    return Step(video, None, sample, host.token_errors(inputs, sample), patches)


def _step_of_own_model(
    model: nn.Module, inputs: Tensor, criterion: AdaMAELoss | None, generator: torch.Generator | None
) -> Step:
    found = model(inputs) if generator is None else model(inputs, generator=generator)
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], MaskSample)):
        raise TypeError(
            f"{type(model).__name__} returned {type(found).__name__}, expected (prediction [B, M, P], MaskSample), as "
            "the README's YourMAE does. Return both, patch the model, or pass tensors: overview(video, prediction, "
            "sample, token_error, normalize=...)."
        )
    return _judged(model, inputs, *found, criterion)


def _judged(
    model: nn.Module, video: Tensor, prediction: Tensor, sample: MaskSample, criterion: AdaMAELoss | None
) -> Step:
    if not isinstance(criterion, AdaMAELoss):
        raise TypeError(
            f"{type(model).__name__} does not compute its loss, so the errors are the criterion's. Got "
            f"{type(criterion).__name__}, expected the AdaMAELoss of your training: overview(model, inputs, criterion)."
        )
    error = criterion(prediction, video, sample).token_error
    return Step(_one_row_a_mask(video, sample), prediction, sample, error, criterion.patches)


def _one_row_a_mask(video: Tensor, sample: MaskSample) -> Tensor:
    """The video with each clip as often as it has masks."""
    return video.repeat_interleave(sample.mask.shape[0] // video.shape[0], 0)


def step_of_tensors(
    video: Tensor,
    prediction: Tensor,
    sample: MaskSample,
    token_error: Tensor,
    *,
    normalize: bool,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
) -> Step:
    """The step with these tensors."""
    return Step(video, prediction, sample, token_error, PatchFormat.of(patch_size, tubelet_size, normalize))


def step_of(what: nn.Module | Tensor, *more: Any, **how: Any) -> Step:
    """The step of a model and its inputs, or of tensors."""
    return step_of_model(what, *more, **how) if isinstance(what, nn.Module) else step_of_tensors(what, *more, **how)


def shown_frames(video: Tensor, clip: int, patches: PatchFormat, channels: Sequence[int] | None = None) -> Tensor:
    """[T, H, W, C] of one clip on the CPU: uint8 as it is, floating point in [0, 1].

    Floating-point pixels lose the mean and deviation that the patches state. Without these they are stretched over the
    range of the clip, if they leave [0, 1].

    Raises:
        ValueError: there is no clip of this number, or a picture cannot show so many channels.
    """
    if not 0 <= clip < video.shape[0]:
        raise ValueError(f"clip={clip}, and the batch has {video.shape[0]}; count from 0.")
    frames = video[clip].permute(1, 2, 3, 0).cpu()
    if frames.is_floating_point():
        frames = frames.float()
        if patches.mean is not None and patches.std is not None:
            frames = frames * torch.tensor(patches.std) + torch.tensor(patches.mean)
        frames = stretched(frames, frames).clamp(0, 1)
    if channels is not None:
        frames = frames[..., list(channels)]
    if frames.shape[-1] not in (1, 3):
        raise ValueError(
            f"video has {frames.shape[-1]} channels, expected 1 (grey) or 3 (RGB); choose some, as channels=(2, 1, 0)."
        )
    return frames


def stretched(values: Tensor, clip: Tensor) -> Tensor:
    """Values with a clip's range mapped to [0, 1], if the clip leaves [0, 1]; else as they are."""
    low, high = (float(each) for each in clip.aminmax())
    return values if low >= 0 and high <= 1 else (values - low) / (high - low)


def predicted_video(
    prediction: Tensor,
    video: Tensor,
    sample: MaskSample,
    *,
    normalize: bool,
    statistics: Statistics = "true",
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
) -> Tensor:
    """The clip with its masked patches predicted and its visible ones as they are.

    With a normalised target the decoder predicts neither brightness nor contrast of a patch. "true" takes both from the
    true patch. The picture is then readable, and better than the model: say so where you show it. "visible" takes the
    averages over the visible patches of the clip, so it uses only what the model saw.

    Args:
        prediction: [B, M, P].
        video: [B, C, T, H, W] uint8.
        sample: the mask.
        normalize: whether the target was normalised per patch and channel.
        statistics: source of brightness and contrast of a normalised prediction, "true" or "visible".
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.

    Returns:
        [B, C, T, H, W] in [0, 1].
    """
    patches = PatchFormat.of(patch_size, tubelet_size, normalize)
    return filled_in(prediction, video, sample, patches, statistics).clamp(0, 1)


def filled_in(
    prediction: Tensor, video: Tensor, sample: MaskSample, patches: PatchFormat, statistics: Statistics
) -> Tensor:
    """`predicted_video` before values are limited to [0, 1]."""
    if statistics not in ("true", "visible"):
        raise ValueError(f"statistics={statistics!r}, expected 'true' or 'visible'.")
    pixels = target_rows(video, None, patches._replace(normalize=False))  # [B, N, P]
    masked_idx = _expand(sample.masked_idx, pixels)
    predicted = prediction.detach().float()
    if patches.normalize:
        channels = video.shape[1]
        known = masked_idx if statistics == "true" else _expand(sample.visible_idx, pixels)
        known_pixels = pixels.gather(1, known).unflatten(-1, (-1, channels))  # [B, M or K, pixels, C]
        variance, mean = torch.var_mean(known_pixels, dim=-2, keepdim=True)
        deviation = variance.sqrt() + STD_EPS
        if statistics == "visible":
            mean, deviation = mean.mean(1, keepdim=True), deviation.mean(1, keepdim=True)
        predicted = (predicted.unflatten(-1, (-1, channels)) * deviation + mean).flatten(-2)
    filled = pixels.scatter(1, masked_idx, predicted)
    return join_patches(filled, patches.grid(video.shape), patches)


def _expand(idx: Tensor, pixels: Tensor) -> Tensor:
    return idx[..., None].expand(-1, -1, pixels.shape[2])


def check_grid(step: Step) -> tuple[int, int, int]:
    """The (T, H, W) grid of the tokens; raises ValueError if the mask has another number of them."""
    grid = step.patches.grid(step.video.shape)
    if math.prod(grid) != step.sample.num_tokens:
        raise ValueError(
            f"the mask has {step.sample.num_tokens} tokens, and patches of {step.patches.patch} cut a video of "
            f"{tuple(step.video.shape[2:])} into {math.prod(grid)}; give the patch_size and tubelet_size of the model."
        )
    return grid
