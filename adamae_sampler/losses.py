"""The losses of AdaMAE: reconstruction error, sampling loss, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from adamae_sampler import ops
from adamae_sampler.mask import MaskSample
from adamae_sampler.ops.patches import PatchSize
from adamae_sampler.ops.reconstruction_error import Kind


def reconstruction_error(
    prediction: Tensor,
    video: Tensor,
    sample: MaskSample,
    *,
    kind: Kind = "mse",
    normalize: bool = True,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The error of each masked token, [B, M] fp32; L_R is its mean.

    Args:
        prediction: [B, M, P], the decoder's output for the masked tokens in the order of `sample.masked_idx`.
        video: [B, C, T, H, W], uint8 pixels, or floating point as the target should be (see `mean`).
        sample: the mask.
        kind: "mse" or "l1".
        normalize: normalise the target per patch and channel (the default of the paper), or take raw pixels.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means that a floating-point video was normalised with, to turn it back into pixels.
        std: the standard deviations that go with `mean`.

    Raises:
        TypeError, ValueError: shapes, dtypes or arguments that do not fit each other.
    """
    _check_sample(sample)
    return ops.reconstruction_error(
        prediction,
        video,
        sample.masked_idx,
        kind=kind,
        normalize=normalize,
        patch_size=patch_size,
        tubelet_size=tubelet_size,
        mean=mean,
        std=std,
    )


def sampling_loss(sample: MaskSample, error: Tensor) -> Tensor:
    """L_S, a scalar: -mean over masked tokens of log p_i * stop_gradient(e_i). Its gradient is the sampler's alone.

    Args:
        sample: a mask with log-probabilities.
        error: [B, M] from `reconstruction_error`.

    Raises:
        ValueError: the sample has no log-probabilities, or the shapes do not fit.
    """
    _check_sample(sample)
    if sample.log_probs is None:
        raise ValueError(
            "sample.log_probs is None: random, tube and frame masks have no distribution to learn. "
            "Use AdaptiveTokenSampler, or AdaMAELoss, which leaves the sampling loss out for them."
        )
    return ops.sampling_loss(sample.log_probs, sample.masked_idx, error)


class LossOutput(NamedTuple):
    """The terms of the loss; all fp32.

    Attributes:
        loss: scalar, reconstruction + sampling_weight * sampling; call backward on it.
        reconstruction: scalar, L_R.
        sampling: scalar, L_S before its weight; 0 for masks without a distribution.
        token_error: [B, M], the error of each masked token; with a decode_mask [B, tokens left], 0 for visible ones.
    """

    loss: Tensor
    reconstruction: Tensor
    sampling: Tensor
    token_error: Tensor


class AdaMAELoss(nn.Module):
    """L = L_R + sampling_weight * L_S (Algorithm 2).

    Args:
        sampling_weight: weight of the sampling loss, 1e-4 in the paper.
        kind: see `reconstruction_error`, as for all further arguments.
        normalize: see `reconstruction_error`.
        patch_size: see `reconstruction_error`.
        tubelet_size: see `reconstruction_error`.
        mean: see `reconstruction_error`.
        std: see `reconstruction_error`.
    """

    def __init__(
        self,
        sampling_weight: float = 1e-4,
        *,
        kind: Kind = "mse",
        normalize: bool = True,
        patch_size: PatchSize = 16,
        tubelet_size: int = 2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.sampling_weight = sampling_weight
        self.kind: Kind = kind
        self.normalize = normalize
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.mean = mean
        self.std = std

    def forward(
        self, prediction: Tensor, video: Tensor, sample: MaskSample, decode_mask: Tensor | None = None
    ) -> LossOutput:
        """The losses of a step.

        Args:
            prediction: [B, M, P], see `reconstruction_error`.
            video: [B, C, T, H, W], see `reconstruction_error`.
            sample: the mask.
            decode_mask: [B, N] bool, True = not decoded, for decoders that leave tokens out (VideoMAEv2): then the
                prediction is [B, tokens left, P], and the losses are means over those of them that are masked.

        Raises:
            TypeError, ValueError: shapes, dtypes or arguments that do not fit each other.
        """
        share: Tensor | float = 1.0  # of the tokens decoded that are masked
        if decode_mask is not None:
            sample = _decoded(sample, decode_mask, prediction.shape[1])
        error = self._error(prediction, video, sample)
        if decode_mask is not None:
            masked = sample.mask.gather(1, sample.masked_idx)
            error, share = error * masked, masked.float().mean()
        reconstruction = error.mean() / share
        if sample.log_probs is None:
            return LossOutput(reconstruction, reconstruction, error.new_zeros(()), error)
        sampling = sampling_loss(sample, error) / share
        return LossOutput(reconstruction + self.sampling_weight * sampling, reconstruction, sampling, error)

    def _error(self, prediction: Tensor, video: Tensor, sample: MaskSample) -> Tensor:
        return reconstruction_error(
            prediction,
            video,
            sample,
            kind=self.kind,
            normalize=self.normalize,
            patch_size=self.patch_size,
            tubelet_size=self.tubelet_size,
            mean=self.mean,
            std=self.std,
        )

    def extra_repr(self) -> str:
        """For print(loss)."""
        return (
            f"sampling_weight={self.sampling_weight}, kind={self.kind!r}, normalize={self.normalize}, "
            f"patch_size={self.patch_size}, tubelet_size={self.tubelet_size}"
        )


def _check_sample(sample: MaskSample) -> None:
    if not isinstance(sample, MaskSample):
        raise TypeError(
            f"sample is {type(sample).__name__}, expected a MaskSample, as samplers return it; "
            "MaskSample.from_mask(mask, num_visible) makes one of a boolean mask."
        )


def _decoded(sample: MaskSample, decode_mask: Tensor, num_decoded: int) -> MaskSample:
    """The sample with the tokens that the decoder gives in the place of the masked ones."""
    if decode_mask.shape != sample.mask.shape:
        raise ValueError(
            f"decode_mask has shape {tuple(decode_mask.shape)}, expected {tuple(sample.mask.shape)}: clips, tokens."
        )
    left = MaskSample.from_mask(decode_mask, num_decoded).visible_idx  # [B, tokens left]
    return MaskSample(sample.visible_idx, left, sample.mask, sample.log_probs)
