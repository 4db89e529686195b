"""draw_mask: K tokens of each clip, drawn without replacement from the softmax of its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.mask import MaskSample, check_num_visible, free_to_read
from adamae_sampler.ops.backend import backend_for, jit, launch, next_power_of_2, tl
from adamae_sampler.ops.checks import at_least_fp32, check_device, check_floating
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.selection import split_by_largest

# Keys stay in a range where fp32 resolves Gumbel noise to a hundredth. The noise itself is within about [-4.5, 88].
_LOWEST_FINITE = -(2.0**17)
_BELOW_FINITE = 2 * _LOWEST_FINITE
_ABOVE_FINITE = 100.0

_LARGEST_TILE = 4096  # a longer row does not fit into registers, and is read in tiles
_MOST_TOKENS = 2**21 - 1  # three counts of tokens share the 63 bits of an int64


# ---------------------------------------------------------------------------------------------------- reference


def _draw_mask_reference(scores: Tensor, num_visible: int, noise: Tensor) -> MaskSample:
    finite = _finite(scores)
    keys = _ranking_keys(at_least_fp32(scores.detach()), noise, finite)
    return MaskSample(*split_by_largest(keys, num_visible), *_log_probs(scores, finite))


def token_log_probs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax of scores [B, N] in fp32, and how many scores of each row are not finite, [B] int64."""
    return _log_probs(scores, _finite(scores))


def _log_probs(scores: Tensor, finite: Tensor | None) -> tuple[Tensor, Tensor]:
    num_nonfinite = torch.zeros(len(scores), dtype=torch.int64) if finite is None else (~finite).sum(1)
    return F.log_softmax(at_least_fp32(scores), dim=1), num_nonfinite


def _finite(scores: Tensor) -> Tensor | None:
    """Which scores are finite, [B, N] bool. None if all are, where a check costs nothing."""
    scores = scores.detach()
    if free_to_read(scores) and scores.numel() > 0:
        low, high = scores.aminmax()
        if -math.inf < float(low) and float(high) < math.inf:  # both are False for NaN
            return None
    return scores.abs() < torch.inf  # `isfinite` would run four operators


def _ranking_keys(scores: Tensor, noise: Tensor, finite: Tensor | None) -> Tensor:
    """Scores + noise, with every key finite: +inf ranks above all numbers, -inf and NaN below, each in random order.

    The scores are shifted by their row's maximum first, so that likely tokens keep full precision. Scores that are 2^17
    or more below the maximum, such as padding of -1e9, count as equal: their probability is 0 in any precision.
    """
    noise = noise.to(scores.dtype)
    if finite is None:
        return (scores - scores.amax(1, keepdim=True)).clamp_min_(_LOWEST_FINITE).add_(noise)
    highest = scores.where(finite, -torch.inf).amax(1, keepdim=True)  # -inf in a row with no finite score
    outlier = scores.nan_to_num(_BELOW_FINITE, _ABOVE_FINITE, _BELOW_FINITE)
    return (scores - highest).clamp_min(_LOWEST_FINITE).where(finite, outlier) + noise


def uniform_noise(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers from 0 to below 1, fp32. `torch.rand(generator=None)` takes no symbolic size in torch.compile."""
    return torch.empty(shape, dtype=torch.float32, device=device).uniform_(generator=generator)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise, fp32, of the shape and on the device of `like`."""
    uniform = uniform_noise(like.shape, like.device, generator)  # multiples of 2^-24 below 1
    return uniform.clamp_min_(2.0**-25).log_().neg_().log_().neg_()  # three times as fast as `exponential_` on a CPU


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def _gumbel(seed, clip, token):
    """Standard Gumbel noise of a token: one Philox block, keyed by the seed and counted by token and clip."""
    bits, _, _, _ = tl.philox(seed, token, clip, 0, 0)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)  # 2^-23 apart: exact, and never 0 or 1
    return -tl.log(-tl.log(uniform))


@jit
def _as_ordered_bits(key):
    """fp32 -> uint32 in the same order; 0 stays unused. NaN is largest and -0 equals 0, as in torch's sort."""
    bits = key.to(tl.uint32, bitcast=True)
    ordered = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    ordered = tl.where(key == 0.0, 0x80000000, ordered)
    return tl.where(key != key, 0xFFFFFFFF, ordered)


@jit
def _draw_mask_kernel(
    scores_ptr,
    noise_ptr,
    seed_ptr,
    keys_ptr,
    visible_ptr,
    masked_ptr,
    mask_ptr,
    log_probs_ptr,
    num_nonfinite_ptr,
    N,
    K,
    LOWEST: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    GIVEN_NOISE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program draws one clip's mask. Each thread keeps its own sums until a loop ends."""
    INF: tl.constexpr = float("inf")
    clip = tl.program_id(0).to(tl.int64)
    scores_ptr += clip * N
    lane = tl.arange(0, TILE)
    stop = TILE if ONE_TILE else N  # Triton drops a loop that is known to run once
    score = tl.load(scores_ptr + lane, mask=lane < N, other=0.0).to(tl.float32)

    top = tl.full((TILE,), -INF, tl.float32)  # the largest finite scores
    nonfinite = tl.full((TILE,), 0, tl.int32)
    for start in range(0, stop, TILE):
        token = start + lane
        if not ONE_TILE:
            score = tl.load(scores_ptr + token, mask=token < N, other=0.0).to(tl.float32)
        finite = (tl.abs(score) < INF) & (token < N)
        top = tl.maximum(top, tl.where(finite, score, -INF))
        nonfinite += ((~finite) & (token < N)).to(tl.int32)
    highest = tl.max(top)
    tl.store(num_nonfinite_ptr + clip, tl.sum(nonfinite))

    # Keys, and the sum that turns scores into probabilities.
    if not GIVEN_NOISE:
        seed = (tl.load(seed_ptr) << 31) ^ tl.load(seed_ptr + 1)
    totals = tl.zeros((TILE,), tl.float32)
    keys = tl.full((TILE,), 0, tl.uint32)
    for start in range(0, stop, TILE):
        token = start + lane
        if not ONE_TILE:
            score = tl.load(scores_ptr + token, mask=token < N, other=0.0).to(tl.float32)
        shifted = score - highest
        totals += tl.where(token < N, tl.exp(shifted), 0.0)
        if GIVEN_NOISE:
            noise = tl.load(noise_ptr + clip * N + token, mask=token < N, other=0.0).to(tl.float32)
        else:
            noise = _gumbel(seed, clip.to(tl.int32), token)
        outlier = tl.where(score == INF, ABOVE, BELOW)
        key = tl.where(tl.abs(score) < INF, tl.maximum(shifted, LOWEST), outlier) + noise
        keys = tl.where(token < N, _as_ordered_bits(key), 0).to(tl.uint32)
        if not ONE_TILE:
            tl.store(keys_ptr + clip * N + token, keys.to(tl.int32, bitcast=True), mask=token < N)
            tl.store(log_probs_ptr + clip * N + token, shifted, mask=token < N)
    if not ONE_TILE:
        tl.debug_barrier()  # the program's threads read each other's keys from here on

    total = tl.sum(totals)
    log_total = tl.log(tl.where(total == INF, float("nan"), total))  # a score of +inf leaves no distribution
    for start in range(0, stop, TILE):
        token = start + lane
        shifted = score - highest
        if not ONE_TILE:
            shifted = tl.load(log_probs_ptr + clip * N + token, mask=token < N, other=0.0)
        tl.store(log_probs_ptr + clip * N + token, shifted - log_total, mask=token < N)

    # Find the K-th largest key from its highest bits to its lowest, two bits at a time. For each of three candidates,
    # count the keys at or above it. Take the largest candidate that at least K keys reach.
    COUNT_BITS: tl.constexpr = 21
    COUNT_MASK: tl.constexpr = (1 << 21) - 1
    threshold = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        reach = tl.full((TILE,), 0, tl.int64)
        for start in range(0, stop, TILE):
            if not ONE_TILE:
                token = start + lane
                keys = tl.load(keys_ptr + clip * N + token, mask=token < N, other=0).to(tl.uint32, bitcast=True)
            one = (keys >= threshold + unit).to(tl.int64)
            two = (keys >= threshold + 2 * unit).to(tl.int64)
            three = (keys >= threshold + 3 * unit).to(tl.int64)
            reach += one + (two << COUNT_BITS) + (three << 2 * COUNT_BITS)
        counts = tl.sum(reach)
        reached = ((counts & COUNT_MASK) >= K).to(tl.uint32)
        reached += (((counts >> COUNT_BITS) & COUNT_MASK) >= K).to(tl.uint32)
        reached += ((counts >> 2 * COUNT_BITS) >= K).to(tl.uint32)
        threshold += reached * unit
        unit = unit >> 2

    above = tl.full((TILE,), 0, tl.int32)
    for start in range(0, stop, TILE):
        if not ONE_TILE:
            token = start + lane
            keys = tl.load(keys_ptr + clip * N + token, mask=token < N, other=0).to(tl.uint32, bitcast=True)
        above += (keys > threshold).to(tl.int32)
    num_ties_taken = K - tl.sum(above)  # keys equal to the threshold that are drawn: the lowest tokens

    # Write both lists in ascending order. A visible token's index in its list is the number of visible tokens before
    # it. One prefix sum counts keys above the threshold in its low half, and keys equal to it in its high half.
    before_tile = tl.full((), 0, tl.int64)
    for start in range(0, stop, TILE):
        token = start + lane
        if not ONE_TILE:
            keys = tl.load(keys_ptr + clip * N + token, mask=token < N, other=0).to(tl.uint32, bitcast=True)
        is_above = keys > threshold
        tie = keys == threshold
        counted = is_above.to(tl.int64) + (tie.to(tl.int64) << 32)
        before = before_tile + tl.cumsum(counted) - counted
        ties_before = (before >> 32).to(tl.int32)
        visible_before = (before & 0xFFFFFFFF).to(tl.int32) + tl.minimum(ties_before, num_ties_taken)
        visible = is_above | (tie & (ties_before < num_ties_taken))
        tl.store(visible_ptr + clip * K + visible_before, token.to(tl.int64), mask=visible)
        masked_place = clip * (N - K) + token - visible_before
        tl.store(masked_ptr + masked_place, token.to(tl.int64), mask=(token < N) & ~visible)
        tl.store(mask_ptr + clip * N + token, ~visible, mask=token < N)
        before_tile += tl.sum(counted)


@jit
def _log_softmax_backward_kernel(grad_ptr, log_probs_ptr, grad_scores_ptr, N, TILE: tl.constexpr):
    """grad - p sum(grad), one clip a program."""
    clip = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    totals = tl.zeros((TILE,), tl.float32)
    for start in range(0, N, TILE):
        token = start + lane
        totals += tl.load(grad_ptr + clip * N + token, mask=token < N, other=0.0)
    total = tl.sum(totals)
    for start in range(0, N, TILE):
        token = start + lane
        grad = tl.load(grad_ptr + clip * N + token, mask=token < N, other=0.0)
        probs = tl.exp(tl.load(log_probs_ptr + clip * N + token, mask=token < N, other=0.0))
        tl.store(grad_scores_ptr + clip * N + token, grad - probs * total, mask=token < N)


# ----------------------------------------------------------------------------------------------------- operator


def _obstacle(num_tokens: int) -> str:
    return "" if num_tokens <= _MOST_TOKENS else f"the kernel draws from up to {_MOST_TOKENS} tokens, not {num_tokens}"


def _tile_and_warps(num_tokens: int) -> dict[str, int]:
    """One tile for a row if it fits, and eight tokens for each thread."""
    tile = min(next_power_of_2(num_tokens), _LARGEST_TILE)
    return {"TILE": tile, "num_warps": max(1, min(tile // 256, 16))}


def _empty_sample(
    scores: Tensor, num_visible: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens = scores.shape
    return (
        scores.new_empty(batch, num_tokens, dtype=torch.float32),
        scores.new_empty(batch, num_visible, dtype=torch.int64),
        scores.new_empty(batch, num_tokens - num_visible, dtype=torch.int64),
        scores.new_empty(batch, num_tokens, dtype=torch.bool),
        scores.new_empty(batch, dtype=torch.int64),
    )


@operator(
    "draw_mask(Tensor scores, SymInt num_visible, Tensor? noise, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _empty_sample,
)
def _draw_mask_op(
    scores: Tensor, num_visible: int, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns MaskSample's tensors, log_probs first. The noise is `noise`, or made from `seed`, two 31-bit int64."""
    log_probs, visible_idx, masked_idx, mask, num_nonfinite = _empty_sample(scores, num_visible, noise, seed)
    (batch, num_tokens), tile = scores.shape, _tile_and_warps(scores.shape[1])
    one_tile = num_tokens <= tile["TILE"]
    launch(
        _draw_mask_kernel,
        batch,
        scores.contiguous(),
        None if noise is None else noise.contiguous(),
        seed,
        None if one_tile else torch.empty(batch, num_tokens, dtype=torch.int32, device=scores.device),
        visible_idx,
        masked_idx,
        mask,
        log_probs,
        num_nonfinite,
        num_tokens,
        num_visible,
        LOWEST=_LOWEST_FINITE,
        BELOW=_BELOW_FINITE,
        ABOVE=_ABOVE_FINITE,
        GIVEN_NOISE=noise is not None,
        ONE_TILE=one_tile,
        **tile,
    )
    return log_probs, visible_idx, masked_idx, mask, num_nonfinite


@operator("log_softmax_backward(Tensor grad, Tensor log_probs) -> Tensor", lambda grad, x: torch.empty_like(x))
def _log_softmax_backward_op(grad: Tensor, log_probs: Tensor) -> Tensor:
    grad_scores, (batch, num_tokens) = torch.empty_like(log_probs), log_probs.shape
    rows = (grad.contiguous(), log_probs, grad_scores)
    launch(_log_softmax_backward_kernel, batch, *rows, num_tokens, **_tile_and_warps(num_tokens))
    return grad_scores


class _DrawMask(torch.autograd.Function):
    """The draw has no gradient; its log-probabilities have one."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, num_visible: int, noise: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor, ...]:
        log_probs, *draw = _draw_mask_op(scores, num_visible, noise, seed)
        ctx.mark_non_differentiable(*draw)
        ctx.save_for_backward(log_probs)
        ctx.dtype = scores.dtype
        return log_probs, *draw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (log_probs,) = ctx.saved_tensors
        return _log_softmax_backward_op(grad, log_probs).to(ctx.dtype), None, None, None


# ------------------------------------------------------------------------------------------------------- public


def draw_mask(
    scores: Tensor,
    num_visible: int,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskSample:
    """Draws the visible tokens of each clip without replacement from p = softmax(scores) (Algorithm 1).

    By the Gumbel-top-k identity (Kool et al., 2019, arXiv:1903.06059) the K largest of log p + Gumbel noise are
    K successive draws from p without replacement. This is one selection in fp32 log space, so it always gives exactly
    K distinct indices, even for probabilities that underflow and for scores that are not finite. +inf is drawn first,
    -inf and NaN last, and the sample counts the scores that are not finite.

    The kernel keeps a clip of up to 4096 tokens in registers. It reads a longer clip, of up to 2^21 - 1 tokens, in
    tiles of 4096. More tokens take the reference. The noise is Philox, keyed by a number that the generator draws on
    the device, so a replayed CUDA graph draws afresh. If you pass a generator, register it with the graph.

    Args:
        scores: [B, N], floating point. The draw itself has no gradient; `log_probs` has.
        num_visible: K, between 1 and N - 1.
        noise: [B, N] standard Gumbel noise to use instead of the op's own. The same noise gives the same draw on
            every device and backend. Of equal keys, the one with the lower index is drawn first.
        generator: source of the noise; None means torch's default generator of the scores' device.

    Returns:
        MaskSample with `log_probs` (fp32, log softmax of the scores, non-finite ones included) and
        `num_nonfinite`.

    Raises:
        TypeError: scores or noise are not floating point.
        ValueError: scores are not [B, N], noise has another shape or device, both noise and generator are given,
            or K is out of range.

    >>> import torch
    >>> sample = draw_mask(torch.tensor([[0.0, 9.0, 0.0, 9.0]]), 2, noise=torch.zeros(1, 4))
    >>> sample.visible_idx.tolist(), sample.masked_idx.tolist()
    ([[1, 3]], [[0, 2]])
    """
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected [B, N]: one score for each token.")
    check_num_visible(num_visible, scores.shape[1])
    if noise is not None:
        check_floating("noise", noise)
        if generator is not None:
            raise ValueError("noise and generator are both given, and noise leaves the generator unused. Give one.")
        if noise.shape != scores.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {tuple(scores.shape)}, as scores.")
        check_device("noise", noise, scores.device)
    if backend_for(scores, obstacle=_obstacle(scores.shape[1])) == "triton":
        seed = None
        if noise is None:
            # Two numbers, since compiled code draws them in 32 bits.
            seed = torch.randint(2**31 - 1, (2,), device=scores.device, generator=generator)
        log_probs, visible_idx, masked_idx, mask, num_nonfinite = _DrawMask.apply(scores, num_visible, noise, seed)
        return MaskSample(visible_idx, masked_idx, mask, log_probs, num_nonfinite)
    if noise is None:
        noise = gumbel_noise(scores, generator)
    return _draw_mask_reference(scores, num_visible, noise)
