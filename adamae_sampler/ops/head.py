"""head_error: the decoder's last layer and the reconstruction error in one op, which stores no prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamae_sampler.ops.backend import backend_for
from adamae_sampler.ops.checks import check_device, check_floating, check_index_shape, check_indices, check_target
from adamae_sampler.ops.patch_format import PatchFormat, PatchSize
from adamae_sampler.ops.pixel_error import (
    HOW,
    error_obstacle,
    error_reference,
    from_plain,
    launch_error,
    scale_rows_op,
    to_plain,
)
from adamae_sampler.ops.registration import operator
from adamae_sampler.ops.target import Kind, check_kind

_CHUNK_BYTES = 24 * 2**20  # bytes of predictions in a chunk, which fit into the L2 cache of a data-centre GPU


def _chunks(draws: int, num_masked: int, masks: int, rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (masks, tokens, clips) of about `rows` rows.

    A chunk holds several masks, or a piece of one. It never mixes some masks of one clip with masks of another.
    """
    rows = max(1, rows)
    at_once, first = max(1, rows // max(num_masked, 1)), 0
    while first < draws:
        end = min(first + (at_once // masks * masks or at_once), draws)
        if at_once < masks:
            end = min(end, (first // masks + 1) * masks)
        for start in range(0, num_masked, rows):
            yield slice(first, end), slice(start, start + rows), slice(first // masks, -(-end // masks))
        first = end


def _empty_head_error(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    video: Tensor,
    masked_idx: Tensor,
    counted: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient = how[-1]
    high = torch.promote_types(hidden.dtype, torch.float32)
    error = hidden.new_empty(masked_idx.shape, dtype=high)
    of_weight = weight.new_empty(weight.shape if gradient else 0, dtype=high)
    of_bias = weight.new_empty(weight.shape[0] if gradient and bias is not None else 0, dtype=high)
    return error, hidden.new_empty(hidden.shape if gradient else 0), of_weight, of_bias


@operator(
    "head_error(Tensor hidden, Tensor weight, Tensor? bias, Tensor video, Tensor masked_idx, Tensor? counted, "
    f"{HOW}, bool kernel, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    _empty_head_error,
)
def _head_error_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    video: Tensor,
    masked_idx: Tensor,
    counted: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The error [B, M], and with `gradient` the unit gradients of hidden, weight and bias (see `_error_op`).

    The gradients of weight and bias are summed over the chunks in fp32."""
    *plain, kernel, gradient = how
    kind, patches = from_plain(*plain)
    error, of_hidden, of_weight, of_bias = _empty_head_error(hidden, weight, bias, video, masked_idx, counted, gradient)
    of_weight.zero_()
    of_bias.zero_()
    cast = weight.to(hidden.dtype)
    cast_bias = None if bias is None else bias.to(hidden.dtype)
    (draws, num_masked), values = masked_idx.shape, weight.shape[0]
    rows = _CHUNK_BYTES // (values * hidden.element_size())
    # Keeps fp16 sums of many rows in range. The backward pass divides the sums by the number of rows.
    shrink = 2.0**-8 if hidden.dtype == torch.float16 else 1.0
    with torch.autocast(hidden.device.type, enabled=False):  # all products are in the dtype of the hidden states
        for masks, tokens, clips in _chunks(draws, num_masked, draws // max(len(video), 1), rows):
            idx = masked_idx[masks, tokens]
            flat = hidden[masks, tokens].reshape(-1, hidden.shape[2])
            unit = F.linear(flat, cast, cast_bias).view(*idx.shape, values)  # the prediction, at first
            if kernel:
                part = torch.empty(idx.shape, dtype=error.dtype, device=error.device)
                launch_error(unit, video[clips], idx, kind, patches, part, unit if gradient else None)
            else:
                part, unit = error_reference(unit, video[clips], idx, kind, patches)
            if counted is not None:
                left_out = ~counted[masks, tokens]
                part, unit = part.masked_fill(left_out, 0), unit.masked_fill(left_out[..., None], 0)
            error[masks, tokens] = part
            if gradient:
                unit = unit.view(-1, values)
                of_hidden[masks, tokens] = (unit @ cast).view(*idx.shape, -1)
                of_weight.add_(unit.t() @ (flat * shrink if shrink != 1 else flat), alpha=1 / shrink)
                if bias is not None:
                    of_bias += unit.sum(0, dtype=of_bias.dtype)
    return error, of_hidden, of_weight, of_bias


class _HeadError(torch.autograd.Function):
    """The forward pass computes the gradients. The backward pass multiplies them by the gradient of the mean. The idea
    is from fused linear cross entropy (Liger-Kernel, arXiv:2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        video: Tensor,
        masked_idx: Tensor,
        counted: Tensor | None,
        kind: str,
        patches: PatchFormat,
        kernel: bool,
        gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        error, *units = _head_error_op(
            hidden, weight, bias, video, masked_idx, counted, *to_plain(kind, patches), kernel, gradient
        )
        ctx.mark_non_differentiable(error)
        mean, scale = error.mean(), None
        if counted is not None:
            scale = error.numel() / counted.sum()  # from a mean over all tokens to one over those that count
            mean = mean * scale
        if gradient:
            ctx.save_for_backward(*units, scale)
            ctx.factor = (2 if kind == "mse" else 1) / (weight.shape[0] * max(error.numel(), 1))
            ctx.kernel, ctx.dtypes = kernel, (weight.dtype, None if bias is None else bias.dtype)
        return mean, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias, scale = ctx.saved_tensors
        grad = grad if scale is None else grad * scale
        if ctx.kernel:
            grad_hidden = scale_rows_op(of_hidden, grad.expand(of_hidden.shape[:2]), ctx.factor)
        else:  # a scalar with axes makes the product fp32, so half precision does not round the factor
            grad_hidden = (of_hidden * (grad * ctx.factor).view(1, 1, 1)).to(of_hidden.dtype)
        of_weight_dtype, of_bias_dtype = ctx.dtypes
        grad_weight = (of_weight * (grad * ctx.factor)).to(of_weight_dtype)
        grad_bias = None if of_bias_dtype is None else (of_bias * (grad * ctx.factor)).to(of_bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None


def head_error(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    video: Tensor,
    masked_idx: Tensor,
    *,
    kind: Kind = "mse",
    normalize: bool = True,
    patch_size: PatchSize = 16,
    tubelet_size: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reconstruction_error` of the prediction `F.linear(hidden, weight, bias)`, computed in chunks.

    The forward pass also computes the gradients, while a chunk is in the cache. It keeps the gradients of the hidden
    states and the weights, not the prediction. Only the mean error has a gradient.

    Args:
        hidden: [B R, M, D], the input of the last layer, in the order of `masked_idx`; autocast casts it.
        weight: [P, D] of the last layer, in any precision. The product has the precision of the hidden states.
        bias: [P], or None.
        video: [B, C, T, H, W], see `reconstruction_error`.
        masked_idx: [B R, M] int64.
        kind: see `reconstruction_error`.
        normalize: see `reconstruction_error`.
        patch_size: see `reconstruction_error`.
        tubelet_size: see `reconstruction_error`.
        mean: see `reconstruction_error`.
        std: see `reconstruction_error`.

    Returns:
        The mean error, a scalar with a gradient; and the errors [B R, M], without a gradient. Both are fp32, also
        under autocast; fp64 for fp64 hidden states.

    Raises:
        TypeError, ValueError: as `reconstruction_error`; or hidden states, weight and bias do not fit each other.
    """
    patches = PatchFormat.of(patch_size, tubelet_size, normalize, mean, std)
    return fused_error(hidden, weight, bias, video, masked_idx, kind, patches)


def fused_error(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    video: Tensor,
    masked_idx: Tensor,
    kind: Kind,
    patches: PatchFormat,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`head_error` of a given format; with `counted`, [B R, M] bool, the mean over the tokens where it is True."""
    check_kind(kind)
    num_tokens = check_target(video, patches)
    check_index_shape("masked_idx", masked_idx, video.shape[0], video.device, several=True)
    values, width = video.shape[1] * patches.pixels, hidden.shape[-1]
    tensors = [("hidden", hidden, (*masked_idx.shape, width)), ("weight", weight, (values, width))]
    for name, each, expected in [*tensors, *([] if bias is None else [("bias", bias, (values,))])]:
        check_floating(name, each)
        check_device(name, each, video.device)
        if tuple(each.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(each.shape)}, expected {expected}: hidden states of {masked_idx.shape[1]} "
                f"masked tokens, and a layer to the {values} values of a {'x'.join(map(str, patches.patch))} patch."
            )
    check_indices("masked_idx", masked_idx, video.shape[0], num_tokens, video.device, several=True)
    kernel = backend_for(hidden, video, obstacle=error_obstacle(video, patches)) == "triton"
    if torch.is_autocast_enabled(hidden.device.type):  # hidden states that came out of an autocast region in fp32
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    gradient = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (hidden, weight, bias)
    )
    mean_error, error = _HeadError.apply(
        hidden, weight, bias, video.detach(), masked_idx, counted, kind, patches, kernel, gradient
    )
    return mean_error, error
