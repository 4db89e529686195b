"""MaskSample, the indices of visible and masked tokens; and how many tokens of each kind a mask ratio leaves.

The whole package follows one convention. A mask is bool, and True means *masked*. Indices are int64 and ascend within
a row. Code passes on indices, because their shapes are static. Indexing with a boolean mask has a data-dependent shape
and makes the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class MaskSample(NamedTuple):
    """One mask for each clip of a batch, or R masks for each: B R rows, clip by clip.

    B clips (or B R rows), N tokens, K visible, M = N - K masked.

    It is a named tuple, because autograd, DDP, `torch.compile` and data loaders traverse those.

    Attributes:
        visible_idx: [B, K] int64, ascending in each row.
        masked_idx: [B, M] int64, ascending in each row; with `visible_idx` a partition of 0..N-1.
        mask: [B, N] bool, True = masked.
        log_probs: [B, N] fp32, the log of the distribution over tokens that the sampling loss trains; None for
            samplers without one. Only `AdaptiveTokenSampler` has one.
        num_nonfinite: [B] int64, how many of each clip's scores were NaN or infinite; None where there
            were no scores. It stays on the device: reading it is the caller's choice.
        decoded_idx: [B, M'] int64, ascending in each row: the masked tokens that are decoded, drawn uniformly after
            the mask or before it (`held_out`); None if all are.
        difficulty: [B, N] fp32, the predicted error of each token, up to order, which `ranking_loss` trains; None for
            samplers that predict none. Only `HardTokenSampler` does.
        valid: [B, N] bool, the tokens that count; None if all do. Invalid tokens are masked, and the losses leave them
            out.
        held_out: [B, N] bool, the tokens that were set aside as targets before the draw, so that they could not be
            visible; None if none were. `decoded_idx` has their indices.
    """

    visible_idx: Tensor
    masked_idx: Tensor
    mask: Tensor
    log_probs: Tensor | None = None
    num_nonfinite: Tensor | None = None
    decoded_idx: Tensor | None = None
    difficulty: Tensor | None = None
    valid: Tensor | None = None
    held_out: Tensor | None = None

    @property
    def target_idx(self) -> Tensor:
        """The tokens that a decoder predicts: `decoded_idx`, or `masked_idx` if that is None."""
        return target_idx(self)

    @property
    def target_valid(self) -> Tensor | None:
        """Which of `target_idx` count in the losses, [B, M] bool; None if all do."""
        return target_valid(self)

    @property
    def num_visible(self) -> int:
        """K, visible tokens of a clip."""
        return self.visible_idx.shape[1]

    @property
    def num_tokens(self) -> int:
        """N, tokens of a clip."""
        return self.mask.shape[1]

    def replace(self, **changes: Tensor | None) -> MaskSample:
        """The sample with other values of some fields. torch.compile refuses `_replace` in older torch, such as 2.7.

        Raises:
            TypeError: there is no field of that name.
        """
        return MaskSample(**{**dict(zip(MaskSample._fields, self, strict=True)), **changes})  # type: ignore[arg-type]

    def detach(self) -> MaskSample:
        """The sample without gradients."""
        return MaskSample(*(None if each is None else each.detach() for each in self))  # type: ignore[arg-type]

    @classmethod
    def from_mask(cls, mask: Tensor, num_visible: int) -> MaskSample:
        """The sample of a boolean mask.

        Args:
            mask: [B, N] bool, True = masked, with exactly `num_visible` False in each row.
            num_visible: K. Counting it here would make the host wait for the device.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask is not [B, N], K is not in 1..N-1, or a row does not leave K tokens visible. Rows are
                checked on CPU in eager mode only, where that costs no wait for a device. Elsewhere a wrong K puts some
                indices into the wrong list.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"mask is {kind}, expected a torch.bool tensor with True = masked. Use torch.as_tensor(mask), then "
                "mask.bool() if 1 means masked in yours, ~mask.bool() if 1 means visible."
            )
        if mask.ndim != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected [B, N]; use mask.flatten(1).")
        check_num_visible(num_visible, mask.shape[1])
        if free_to_read(mask):
            visible = (~mask).sum(1)
            if (visible != num_visible).any():
                row = int((visible != num_visible).nonzero()[0])
                found = int(visible[row])
                remedy = (
                    "True means masked: pass ~mask if yours is inverted. To keep the mask as it is, pass "
                    f"MaskSample.from_mask(mask, {found}) instead."
                )
                if visible.min() != visible.max():
                    remedy = (
                        f"Its rows leave from {int(visible.min())} to {int(visible.max())}; all must leave the same."
                    )
                raise ValueError(
                    f"mask leaves {found} tokens visible in row {row}, expected {num_visible} in each of its "
                    f"{mask.shape[0]} rows. {remedy}"
                )
        # False sorts before True and a stable sort keeps the order of equals, so one sort yields both lists.
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # [B, N]
        return cls(order[:, :num_visible], order[:, num_visible:], mask)


def target_idx(sample: MaskSample) -> Tensor:
    """`sample.target_idx` for this package's own code. torch before 2.11 compiles no property of it."""
    return sample.masked_idx if sample.decoded_idx is None else sample.decoded_idx


def target_valid(sample: MaskSample) -> Tensor | None:
    """`sample.target_valid` for this package's own code, as `target_idx`."""
    return None if sample.valid is None else sample.valid.gather(1, target_idx(sample))


def num_visible_tokens(num_tokens: int, mask_ratio: float) -> int:
    """K = floor(N (1 - ratio)), with floating-point error removed: N=100, ratio=0.9 gives 10, not 9.

    Raises:
        ValueError: the ratio is not in (0, 1), or leaves no token visible or none masked.
    """
    check_mask_ratio(mask_ratio)
    num_visible = math.floor(num_tokens * (1 - mask_ratio) + _ROUNDING)
    if not 1 <= num_visible < num_tokens:
        largest = math.floor((1 - 1 / num_tokens) * 1e4) / 1e4
        remedy = f"Use at most {largest}, or a finer grid." if num_tokens > 1 else "Use a finer grid."
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves {num_visible} of {num_tokens} tokens visible, expected between 1 and "
            f"{num_tokens - 1}. {remedy}"
        )
    return num_visible


def num_masked_units(num_units: int, mask_ratio: float, unit: str) -> int:
    """How many whole units a structured mask hides: floor(units x ratio), as VideoMAE rounds. Units are spatial
    positions or time steps.

    Raises:
        ValueError: the ratio is not in (0, 1), or hides no unit.
    """
    check_mask_ratio(mask_ratio)
    num_masked = math.floor(num_units * mask_ratio + _ROUNDING)
    if not 1 <= num_masked < num_units:
        if num_units == 1:
            raise ValueError(f"{unit}: the grid has 1, expected at least 2, one to hide and one to show.")
        smallest = math.ceil(1e4 / num_units) / 1e4
        raise ValueError(
            f"mask_ratio={mask_ratio} hides {num_masked} of {num_units} {unit}, expected between 1 and "
            f"{num_units - 1}. Use at least {smallest}, or a grid with more {unit}."
        )
    return num_masked


def check_mask_ratio(mask_ratio: float) -> None:
    """Raises unless the ratio is a number between 0 and 1."""
    if not isinstance(mask_ratio, (int, float)):
        raise TypeError(f"mask_ratio={mask_ratio!r}, expected a number between 0 and 1, such as 0.95.")
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio}, expected a share strictly between 0 and 1, such as 0.95 to mask 95%."
        )


def check_num_visible(num_visible: int, num_tokens: int) -> None:
    """Raises unless num_visible is a whole number that leaves at least one token visible and one masked."""
    if not isinstance(num_visible, (int, torch.SymInt)):
        raise TypeError(
            f"num_visible={num_visible!r}, expected a whole number. To compute it from a ratio, use "
            "adamae_sampler.mask.num_visible_tokens(num_tokens, mask_ratio)."
        )
    if not 1 <= num_visible < num_tokens:
        raise ValueError(
            f"num_visible={num_visible} of {num_tokens} tokens, expected between 1 and {num_tokens - 1}: "
            "at least one token must be visible and one masked."
        )


def check_valid(valid: Tensor, num_visible: int, units: str = "tokens") -> None:
    """Raises unless each row has enough valid tokens: those to show, and one to predict.

    On a GPU nothing is read back. There a row with too few ends the program with an assertion of the device, which does
    not name the row. Call this on the CPU, where the batch is made, to have it named.

    Args:
        valid: [B, N] bool, True = a token that counts.
        num_visible: K.
        units: what a column is, for the message.

    Raises:
        TypeError: it is no bool tensor.
        ValueError: it is not [B, N], or a row has fewer than K + 1 valid tokens.
    """
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        kind = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid is {kind}, expected a torch.bool tensor [B, N] with True = a token that counts.")
    if valid.ndim != 2:
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}, expected [B, N]: clips, tokens. Pool pixels to patches, and "
            "flatten(1) the grid."
        )
    count = valid.sum(1)
    require(
        count > num_visible,
        lambda row: (
            f"row {row} of valid has {int(count[row])} valid {units} of {valid.shape[1]}, expected at least "
            f"{num_visible + 1}: {num_visible} are shown, and one or more is predicted. Leave such clips out of the "
            "batch, or mask a larger share."
        ),
        f"a row of valid has too few valid {units}",
    )


def require(rows: Tensor, message: Callable[[int], str], short: str) -> None:
    """Raises ValueError with the message of the first row that is False. Nothing is read back from a GPU: there it is
    an assertion of the device. Compiled code on a CPU does not check.

    Args:
        rows: [B] bool.
        message: index of a row -> what is wrong with it.
        short: the message where the row is not known.
    """
    if rows.device.type == "cuda":
        torch._assert_async(rows.all(), short)
    elif type(rows) is Tensor and not torch.compiler.is_compiling() and not rows.all():
        raise ValueError(message(int((~rows).nonzero()[0])))


def free_to_read(x: Tensor) -> bool:
    """Whether values of x can be checked at no cost: on CPU, outside of tracing and of fake tensors."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


# It is far above the rounding error of a double-precision product of the sizes in use, and far below 1/N of any grid.
_ROUNDING = 1e-9
