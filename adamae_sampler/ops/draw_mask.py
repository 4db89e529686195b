"""draw_mask: K tokens of each clip, drawn without replacement from the softmax of its scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_sampler.mask import MaskSample, check_num_visible
from adamae_sampler.ops.checks import at_least_fp32, check_floating

# Keys are kept where fp32 still resolves Gumbel noise, which stays within about [-4.5, 88], to a hundredth.
_LOWEST_FINITE = -(2.0**17)
_BELOW_FINITE = 2 * _LOWEST_FINITE
_ABOVE_FINITE = 100.0


def _draw_mask_reference(scores: Tensor, num_visible: int, noise: Tensor) -> MaskSample:
    order = _ranking_keys(at_least_fp32(scores.detach()), noise).argsort(
        dim=1, descending=True, stable=True
    )  # ties: lower index
    mask = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :num_visible], False)
    split = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible first, then masked, each ascending
    return MaskSample(split[:, :num_visible], split[:, num_visible:], mask, *token_log_probs(scores))


def token_log_probs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of scores [B, N] in fp32, and how many scores of each row are not finite, [B] int64."""
    return F.log_softmax(at_least_fp32(scores), dim=1), (~scores.isfinite()).sum(1)


def _ranking_keys(scores: Tensor, noise: Tensor) -> Tensor:
    """Scores + noise with every key finite: +inf ranks above all numbers, -inf and NaN below, each in random order.

    The scores are shifted by their row's maximum first, so that the likely tokens keep full precision. Those 2^17
    below it and further, which padding such as -1e9 is, count as equal: their probability is 0 in any precision.
    """
    finite = scores.isfinite()
    highest = torch.where(finite, scores, -torch.inf).amax(1, keepdim=True)  # -inf in a row with no finite score
    outlier = torch.where(scores == torch.inf, _ABOVE_FINITE, _BELOW_FINITE)
    return torch.where(finite, (scores - highest).clamp_min(_LOWEST_FINITE), outlier) + noise


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, fp32, of the shape and on the device of `like`."""
    exponential = torch.empty_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
    exponential.exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def draw_mask(
    scores: Tensor,
    num_visible: int,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskSample:
    """Draws the visible tokens of each clip without replacement from p = softmax(scores) (Algorithm 1).

    By the Gumbel-top-k identity (Kool et al., 2019, arXiv:1903.06059) the K largest of log p + Gumbel noise are
    K successive draws from p without replacement. It is one sort in fp32 log space, so it always gives exactly K
    distinct indices, for probabilities that underflow and for scores that are not finite too: +inf is drawn
    first, -inf and NaN last, and the sample counts them.

    Args:
        scores: [B, N], floating point. The draw itself has no gradient; `log_probs` has.
        num_visible: K, between 1 and N - 1.
        noise: [B, N] standard Gumbel noise in place of the op's own. The same noise gives the same draw on
            every device; equal keys are ranked by index, the lower first.
        generator: source of the noise; torch's default generator of the scores' device if None.

    Returns:
        MaskSample with `log_probs` (fp32, log softmax of the scores as they are, non-finite ones included)
        and `num_nonfinite`.

    Raises:
        TypeError: scores or noise are not floating point.
        ValueError: scores are not [B, N], noise has another shape, both noise and generator are given, or K
            is out of range.

    >>> import torch
    >>> sample = draw_mask(torch.tensor([[0.0, 9.0, 0.0, 9.0]]), 2, noise=torch.zeros(1, 4))
    >>> sample.visible_idx.tolist(), sample.masked_idx.tolist()
    ([[1, 3]], [[0, 2]])
    """
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected [B, N]: one score for each token.")
    check_num_visible(num_visible, scores.shape[1])
    if noise is None:
        noise = gumbel_noise(scores, generator)
    else:
        check_floating("noise", noise)
        if generator is not None:
            raise ValueError("noise and generator are both given; the generator would not be used. Give one.")
        if noise.shape != scores.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected that of scores, {tuple(scores.shape)}.")
    return _draw_mask_reference(scores, num_visible, noise)
