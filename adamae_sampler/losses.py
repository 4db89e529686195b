"""The losses: reconstruction error, sampling loss, ranking loss, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_sampler import ops
from adamae_sampler.estimators import leave_one_out, set_log_prob
from adamae_sampler.mask import MaskSample, target_idx, target_valid
from adamae_sampler.ops.head import fused_error
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.pixel_error import token_errors
from adamae_sampler.ops.target import Kind, check_kind

Estimator = Literal["categorical", "plackett_luce", "plackett_luce_max"]
_ESTIMATORS: tuple[str, ...] = get_args(Estimator)


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
    """The error of each decoded token, [B, M] fp32. L_R is its mean.

    With invalid tokens their errors are 0, and L_R is `error.sum() / sample.target_valid.sum()`. Fill their pixels with
    any finite number: of NaN the gradient would be NaN.

    With R masks of each clip the prediction, the sample and the error have B R rows; the video has B.

    Args:
        prediction: [B, M, P], the decoder's output in the order of `sample.target_idx`. That is `sample.masked_idx` if
            all masked tokens are decoded.
        video: [B, C, T, H, W], uint8 pixels, or floating-point values; these are the target unless `mean` is given.
        sample: the mask.
        kind: "mse" or "l1".
        normalize: normalise the target per patch and channel (the default of the paper), or take raw pixels.
        patch_size: height and width of a patch, one number or a pair.
        tubelet_size: frames of a patch.
        mean: the channel means by which a floating-point video was normalised. They turn it back into pixels.
        std: the standard deviations that go with `mean`.

    Raises:
        TypeError, ValueError: shapes, dtypes or arguments do not fit each other.
    """
    _check_sample(sample)
    patches = PatchFormat.of(patch_size, tubelet_size, normalize, mean, std)
    return _only(target_valid(sample), token_errors(prediction, video, target_idx(sample), kind, patches))


def sampling_loss(
    sample: MaskSample, error: Tensor, *, estimator: Estimator = "categorical", num_masks: int = 1
) -> Tensor:
    """L_S, a scalar. Its gradient goes to the sampler alone.

    "categorical" is the paper's: -mean over masked tokens of log p_i * stop_gradient(e_i). It raises p where the error
    of a token is large. It is not the gradient of an expected loss. Its fixed point has p_i proportional to the mean
    error of token i over masks, where masks that show the token count as error 0.

    "plackett_luce" is the mean over masks of log P(S) * stop_gradient(f - b), the policy gradient of the expected
    reconstruction error E[f]. Here f is the mean error of a mask, and P(S) the probability of its visible tokens. The
    baseline b is the mean f of the clip's other masks, or of the other clips if there is one mask of each. This loss
    lowers the expected mean error of what stays masked. So it shows tokens that help to predict the others, and tokens
    that are hard themselves, since a token that is shown leaves the mean. A sampler with `target_ratio` takes the mean
    over tokens that were set aside before the draw, and then only the first counts. A single clip with a single mask
    has no baseline, and its gradient has the largest variance.

    "plackett_luce_max" has the opposite sign. It raises that error, so it hides the tokens that are hard to predict.
    The supplement (section F.1) calls its own loss a maximisation of E[L_R], and says in the same place that the
    encoder gets more tokens where prediction is hard. "categorical" does the second, and this one the first.

    Args:
        sample: a mask with log-probabilities.
        error: [B, M] from `reconstruction_error`.
        estimator: "categorical", "plackett_luce" or "plackett_luce_max", see above.
        num_masks: R, masks of each clip.

    Raises:
        ValueError: the sample has no log-probabilities, the estimator is unknown, or shapes do not fit each other.
    """
    _check_sample(sample)
    counted = target_valid(sample)
    if sample.log_probs is None:
        raise ValueError(
            "sample.log_probs is None: these masks have no distribution to learn. Use AdaptiveTokenSampler, or "
            "AdaMAELoss, which leaves the sampling loss out for them."
        )
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}, expected one of {', '.join(map(repr, _ESTIMATORS))}.")
    if estimator == "categorical":
        loss = ops.sampling_loss(sample.log_probs, target_idx(sample), _only(counted, error))
        return loss if counted is None else loss / counted.float().mean()
    of_mask = error.mean(1) if counted is None else _only(counted, error).sum(1) / counted.sum(1)
    advantage = leave_one_out(of_mask.detach(), num_masks)  # [B R]
    loss = (set_log_prob(sample) * advantage).mean()
    return loss if estimator == "plackett_luce" else -loss


def ranking_loss(sample: MaskSample, error: Tensor) -> Tensor:
    """The loss that teaches `HardTokenSampler` which tokens are hard, a scalar. Its gradient goes to the sampler alone.

    It is the mean over pairs of decoded tokens of a clip of -log sigmoid(d_i - d_j), where e_i > e_j (Hard Patches
    Mining, see `HardTokenSampler`). A pair of equal errors has loss 0. Only the order of the errors counts, so the
    predictions d need no scale.

    The mean is estimated from 16 M pairs, i and i + s modulo M for 16 random shifts s. All pairs are equally likely, so
    the estimate has no bias, and its memory grows with M and not with its square.

    Args:
        sample: a mask with difficulties.
        error: [B, M] from `reconstruction_error`, in the order of `sample.target_idx`. Pairs with a NaN are left out of
            the mean.

    Raises:
        ValueError: the sample has no difficulties, or the error is not one of its decoded tokens.
    """
    _check_sample(sample)
    if sample.difficulty is None:
        raise ValueError(
            "sample.difficulty is None: the sampler predicts no errors to rank. Use HardTokenSampler, or AdaMAELoss, "
            "which takes the loss that the sample needs."
        )
    if error.shape != target_idx(sample).shape:
        raise ValueError(
            f"error has shape {tuple(error.shape)}, expected {tuple(target_idx(sample).shape)}: rows, decoded tokens."
        )
    predicted, error = sample.difficulty.gather(1, target_idx(sample)), error.detach()  # [B, M]
    if (counted := target_valid(sample)) is not None:
        error = error.masked_fill(~counted, torch.nan)
    count = error.shape[1]
    if count < 2:
        return (predicted * 0).sum()  # no pair
    shift = torch.randint(1, count, (_SHIFTS, 1), device=error.device)
    other = (torch.arange(count, device=error.device) + shift) % count  # [shifts, M]
    harder = error[:, None] - error[:, other]  # [B, shifts, M]
    loss = F.softplus(-harder.sign() * (predicted[:, None] - predicted[:, other]))
    unequal, known = harder.abs() > 0, ~harder.isnan()  # a NaN is neither
    return torch.where(unequal, loss, 0).sum() / known.sum().clamp(min=1)


_SHIFTS = 16


class HeadInputs(NamedTuple):
    """The input of the decoder's last layer, and that layer's weight and bias. They replace the prediction.

    `AdaMAELoss(fused_head=True)` computes the error and the gradients in chunks, so no [B, M, P] tensor exists.

    Attributes:
        hidden: [B, M, D], in the order of `sample.target_idx`.
        weight: [P, D], of the last layer.
        bias: [P], of the last layer, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class LossOutput(NamedTuple):
    """The terms of the loss, in fp32; in fp64 for fp64 predictions.

    Attributes:
        loss: scalar, reconstruction + sampling_weight * sampling; call backward on it.
        reconstruction: scalar, L_R.
        sampling: scalar, L_S before its weight, or the ranking loss of a sample with difficulties; 0 for masks without
            either.
        token_error: [B, M], the error of each decoded token, 0 for invalid ones. With a fused head it has no gradient.
            With a decode_mask it is [B, decoded tokens], and 0 for visible tokens.
    """

    loss: Tensor
    reconstruction: Tensor
    sampling: Tensor
    token_error: Tensor


class AdaMAELoss(nn.Module):
    """L = L_R + sampling_weight * L_S (Algorithm 2).

    For a sample with difficulties (`HardTokenSampler`) `ranking_loss` takes the place of L_S, with the same weight.

    Args:
        sampling_weight: weight of the sampling loss, 1e-4 in the paper.
        kind: see `reconstruction_error`.
        normalize: see `reconstruction_error`.
        patch_size: see `reconstruction_error`.
        tubelet_size: see `reconstruction_error`.
        mean: see `reconstruction_error`.
        std: see `reconstruction_error`.
        estimator: how the gradient of the sampler is estimated, see `adamae_sampler.sampling_loss`. Estimators assume
            that masks are drawn from p, even masks that the caller passed.
        num_masks: R, masks of each clip; prediction and sample then have R rows for each clip of the video.
        fused_head: whether to also take `HeadInputs`, or a tuple (hidden, weight, bias), instead of a prediction. The
            forward pass then computes the error and all gradients, and the prediction is never stored.

    Raises:
        TypeError, ValueError: an unknown estimator or kind, a number of masks below 1, or sizes, `mean` and `std`
            that are out of range or do not fit each other.
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
        estimator: Estimator = "categorical",
        num_masks: int = 1,
        fused_head: bool = False,
    ) -> None:
        super().__init__()
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator={estimator!r}, expected one of {', '.join(map(repr, _ESTIMATORS))}.")
        if not isinstance(num_masks, int) or num_masks < 1:
            raise ValueError(
                f"num_masks={num_masks!r}, expected the sampler's number of masks for each clip, 1 or more."
            )
        self.estimator: Estimator = estimator
        self.num_masks = num_masks
        self.fused_head = fused_head
        self.sampling_weight = sampling_weight
        check_kind(kind)
        self.kind: Kind = kind
        self.patches = PatchFormat.of(patch_size, tubelet_size, normalize, mean, std)

    def forward(
        self,
        prediction: Tensor | HeadInputs | tuple[Tensor, Tensor, Tensor | None],
        video: Tensor,
        sample: MaskSample,
        decode_mask: Tensor | None = None,
    ) -> LossOutput:
        """The losses of a step.

        Args:
            prediction: [B, M, P], see `reconstruction_error`; or, with `fused_head`, `HeadInputs`.
            video: [B, C, T, H, W], see `reconstruction_error`.
            sample: the mask.
            decode_mask: [B, N] bool, True = not decoded, for decoders with a mask of their own (VideoMAEv2). The
                prediction is then [B, decoded tokens, P], and the losses are means over the masked ones of these.

        Raises:
            TypeError, ValueError: shapes, dtypes or arguments do not fit each other.
        """
        _check_sample(sample)
        if sample.mask.shape[0] != video.shape[0] * self.num_masks:
            raise ValueError(
                f"the sample has {sample.mask.shape[0]} rows, expected {video.shape[0]} clips x num_masks="
                f"{self.num_masks}. Give AdaMAELoss the num_masks of the sampler. A mask passed to the model must have "
                "num_masks rows for each clip."
            )
        if isinstance(prediction, tuple):
            reconstruction, error = self._fused(HeadInputs(*prediction), video, sample, decode_mask)
            return self._with_sampling(reconstruction, error, sample)
        if decode_mask is not None:
            if self.estimator != "categorical" and sample.log_probs is not None:
                raise ValueError(f"estimator={self.estimator!r} takes no decode_mask; use the model's decode_ratio.")
            sample = _decoded(sample, decode_mask, prediction.shape[1])
        error = token_errors(prediction, video, target_idx(sample), self.kind, self.patches)
        counted = target_valid(sample)
        if counted is None:
            return self._with_sampling(error.mean(), error, sample)
        error = _only(counted, error)
        return self._with_sampling(error.sum() / counted.sum(), error, sample)

    def _fused(
        self, inputs: HeadInputs, video: Tensor, sample: MaskSample, decode_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.fused_head:
            raise TypeError(
                "the prediction is a tuple (hidden, weight, bias), expected a tensor. To pass the tuple, give "
                "AdaMAELoss fused_head=True."
            )
        if decode_mask is not None:
            raise ValueError("a fused head takes no decode_mask; pass the prediction itself, a tensor.")
        return fused_error(*inputs, video, target_idx(sample), self.kind, self.patches, target_valid(sample))

    def _with_sampling(self, reconstruction: Tensor, error: Tensor, sample: MaskSample) -> LossOutput:
        if sample.difficulty is not None:
            return self._sum(reconstruction, ranking_loss(sample, error), error)
        if sample.log_probs is None:
            return LossOutput(reconstruction, reconstruction, error.new_zeros(()), error)
        sampling = sampling_loss(sample, error, estimator=self.estimator, num_masks=self.num_masks)
        return self._sum(reconstruction, sampling, error)

    def _sum(self, reconstruction: Tensor, sampling: Tensor, error: Tensor) -> LossOutput:
        return LossOutput(reconstruction + self.sampling_weight * sampling, reconstruction, sampling, error)

    def extra_repr(self) -> str:
        """For print(loss)."""
        return (
            f"sampling_weight={self.sampling_weight}, kind={self.kind!r}, normalize={self.patches.normalize}, "
            f"patch_size={self.patches.patch[1:]}, tubelet_size={self.patches.patch[0]}, estimator={self.estimator!r}, "
            f"num_masks={self.num_masks}"
        )


def _check_sample(sample: MaskSample) -> None:
    if not isinstance(sample, MaskSample):
        raise TypeError(
            f"sample is {type(sample).__name__}, expected a MaskSample, as samplers return it. To convert a boolean "
            "mask, use MaskSample.from_mask(mask, num_visible)."
        )


def _decoded(sample: MaskSample, decode_mask: Tensor, num_decoded: int) -> MaskSample:
    """The sample with the decoded tokens as its masked tokens, of which those that are visible do not count."""
    if decode_mask.shape != sample.mask.shape:
        raise ValueError(
            f"decode_mask has shape {tuple(decode_mask.shape)}, expected {tuple(sample.mask.shape)}: clips, tokens."
        )
    left = MaskSample.from_mask(decode_mask, num_decoded).visible_idx  # [B, tokens left]
    counted = sample.mask if sample.valid is None else sample.mask & sample.valid
    return MaskSample(
        sample.visible_idx, left, sample.mask, sample.log_probs, difficulty=sample.difficulty, valid=counted
    )


def _only(counted: Tensor | None, error: Tensor) -> Tensor:
    """The errors of the tokens that count, and 0 for others, whatever theirs are."""
    return error if counted is None else error.where(counted, 0)
