"""The ops that are timed, each as a kind of `OpCase`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from adamae_sampler import MaskSample, ops
from adamae_sampler.models.layers import sinusoid_table
from benchmarks.ops.base import OpCase, Tensors, name_of
from benchmarks.ops.official import (
    official_assemble,
    official_draw,
    official_error,
    official_gather,
    official_indices,
    official_restore,
    official_sampling_loss,
)

_INDEX, _FP32 = 8, 4  # bytes


@dataclass(frozen=True)
class DrawMask(OpCase):
    """scores [B, N] -> a sample. The official code draws with softmax and multinomial, and finds the indices after."""

    op = "draw_mask"

    @property
    def bytes(self) -> int:
        """Reads the scores; writes both index lists, mask and log-probabilities, and a count for each clip."""
        return self.clips * self.tokens * (_FP32 + _INDEX + 1 + _FP32) + self.clips * _INDEX

    def make(self, device: torch.device) -> Tensors:
        """Scores."""
        return {"scores": 2 * torch.randn(self.clips, self.tokens, device=device)}

    def ours(self, x: Tensors) -> MaskSample:
        """visible_idx, masked_idx, mask, log_probs, num_nonfinite."""
        return ops.draw_mask(x["scores"], self.visible)

    def official(self, x: Tensors) -> tuple[Tensor, ...]:
        """visible_idx, masked_idx, mask, probs."""
        probs, mask = official_draw(x["scores"], self.visible)
        return *official_indices(mask), mask, probs

    def compare(self, x: Tensors) -> None:
        """Both draw at random, so what is checked is that each is a partition into K and M, and p."""
        got, wanted = self.ours(x), self.official(x)
        everything = torch.arange(self.tokens, device=x["scores"].device).expand(self.clips, -1)
        for who, (visible, masked, mask, *_) in (("ours", got), ("official", wanted)):
            self.expect(visible.shape == (self.clips, self.visible), who, f"visible_idx is {tuple(visible.shape)}")
            union = torch.cat([visible, masked], dim=1).sort(1)[0]
            self.expect_same(f"{who}, both lists together", union, everything, torch.float32, is_copy=True)
            for indices in (visible, masked):
                self.expect(bool((indices.diff(dim=1) > 0).all()), who, "indices do not ascend")
            expected = torch.ones_like(mask).scatter(1, visible, False)
            self.expect_same(f"{who}, mask", mask, expected, torch.float32, is_copy=True)
        assert got.log_probs is not None
        log_probs = x["scores"].log_softmax(1)
        self.expect_same("log_probs", got.log_probs, log_probs, torch.float32)
        self.expect_same("p", got.log_probs.exp(), wanted[3], torch.float32)


@dataclass(frozen=True)
class GatherTokens(OpCase):
    """tokens [B, N, D] -> the visible ones with their position [B, K, D]."""

    width: int = 768

    op = "gather_tokens"
    out_axes = "BKD"
    leaves = ("tokens",)
    copies = ("output", "tokens")  # and one addition, which rounds the same everywhere

    @property
    def bytes(self) -> int:
        """Forward: reads the visible rows and the position table, writes them. Backward: writes a row for all N."""
        visible = self.clips * self.visible * self.width * self.dtype.itemsize
        indices = self.clips * self.visible * _INDEX
        everything = self.clips * self.tokens * self.width * self.dtype.itemsize
        table = self.tokens * self.width * _FP32
        return {"forward": 2 * visible + indices + table, "backward": visible + indices + everything}[self.direction]

    def make(self, device: torch.device) -> Tensors:
        """Tokens, a position table and a mask."""
        tokens = torch.randn(self.clips, self.tokens, self.width, device=device, dtype=self.dtype)
        pos = sinusoid_table(self.tokens, self.width).to(device)
        sample = random_sample(self, device)
        return {"tokens": tokens, "pos": pos, "visible_idx": sample.visible_idx, "mask": sample.mask}

    def ours(self, x: Tensors) -> Tensor:
        """[B, K, D]."""
        return ops.gather_tokens(x["tokens"], x["visible_idx"], x["pos"])

    def official(self, x: Tensors) -> Tensor:
        """[B, K, D]."""
        return official_gather(x["tokens"], x["mask"], x["pos"])


@dataclass(frozen=True)
class AssembleTokens(OpCase):
    """Encoded visible tokens [B, K, D] -> the decoder's input [B, N, D]."""

    width: int = 384
    order: Literal["concat", "restore"] = "concat"

    op = "assemble_tokens"
    out_axes = "BND"
    leaves = ("visible", "mask_token")
    copies = ("output", "visible")

    @property
    def detail(self) -> str:
        """The order of the tokens."""
        return self.order

    @property
    def bytes(self) -> int:
        """Forward: reads visible rows and table, writes N rows. Backward: the reverse, without the table."""
        visible = self.clips * self.visible * self.width * self.dtype.itemsize
        everything = self.clips * self.tokens * self.width * self.dtype.itemsize
        indices = self.clips * self.tokens * _INDEX
        mask_token = self.width * _FP32
        forward = visible + mask_token + indices + self.tokens * mask_token + everything
        backward = everything + (indices if self.order == "restore" else 0) + visible + mask_token
        return {"forward": forward, "backward": backward}[self.direction]

    def make(self, device: torch.device) -> Tensors:
        """Visible tokens, the mask token, a position table and a mask, also as MAE's list of where tokens stand."""
        sample = random_sample(self, device)
        return {
            "visible": torch.randn(self.clips, self.visible, self.width, device=device, dtype=self.dtype),
            "mask_token": torch.randn(1, 1, self.width, device=device),
            "pos": sinusoid_table(self.tokens, self.width).to(device),
            "visible_idx": sample.visible_idx,
            "masked_idx": sample.masked_idx,
            "mask": sample.mask,
            "restore_idx": torch.cat([sample.visible_idx, sample.masked_idx], dim=1).argsort(dim=1),
        }

    def ours(self, x: Tensors) -> Tensor:
        """[B, N, D]."""
        sample = MaskSample(x["visible_idx"], x["masked_idx"], x["mask"])
        return ops.assemble_tokens(x["visible"], x["mask_token"], x["pos"], sample, self.order)

    def official(self, x: Tensors) -> Tensor:
        """[B, N, D]. The mask token is cast: in fp32 it would make the whole output fp32."""
        mask_token = x["mask_token"].to(self.dtype)
        if self.order == "restore":
            return official_restore(x["visible"], mask_token, x["pos"], x["restore_idx"])
        return official_assemble(x["visible"], mask_token, x["pos"], x["mask"])


@dataclass(frozen=True)
class ReconstructionError(OpCase):
    """prediction [B, M, P] and video -> the error of each masked token [B, M]."""

    width: int = 3 * 2 * 16 * 16  # P of tubelets of 2 x 16 x 16 pixels
    grid: tuple[int, int, int] = (8, 14, 14)
    video_dtype: torch.dtype = torch.float32
    kind: Literal["mse", "l1"] = "mse"
    normalize: bool = True

    op = "reconstruction_error"
    out_axes = "BM"
    leaves = ("prediction",)

    @property
    def detail(self) -> str:
        """The kind of the error."""
        return f"{self.kind} of {'normalised' if self.normalize else 'raw'} pixels"

    @property
    def dtypes(self) -> str:
        """The dtypes of prediction and video."""
        return f"{name_of(self.dtype)} and {name_of(self.video_dtype)} video"

    @property
    def bytes(self) -> int:
        """Reads predictions and the masked tokens' pixels, writes errors; with backward, a gradient as well."""
        values = self.clips * self.masked * self.width
        read = values * (self.dtype.itemsize + self.video_dtype.itemsize) + self.clips * self.masked * _INDEX
        errors = self.clips * self.masked * _FP32
        both = read + 2 * errors + values * self.dtype.itemsize  # the errors' gradient is read
        return {"forward": read + errors, "forward+backward": both}[self.direction]

    @property
    def out_dtype(self) -> torch.dtype:
        """Errors are fp32."""
        return torch.float32

    def make(self, device: torch.device) -> Tensors:
        """Predictions, a video, and the fp32 one, mean/std-normalised, that the official code takes."""
        frames, height, width = self.grid
        shape = (self.clips, 3, 2 * frames, 16 * height, 16 * width)
        pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)
        normalised = (pixels / 255 - _per_channel(IMAGENET_DEFAULT_MEAN, device)) / _per_channel(
            IMAGENET_DEFAULT_STD, device
        )
        video = pixels if self.video_dtype == torch.uint8 else normalised.to(self.video_dtype)
        sample = random_sample(self, device)
        return {
            "prediction": torch.randn(self.clips, self.masked, self.width, device=device, dtype=self.dtype),
            "video": video,
            "normalised": normalised if self.video_dtype == torch.uint8 else video,
            "masked_idx": sample.masked_idx,
            "mask": sample.mask,
        }

    def ours(self, x: Tensors) -> Tensor:
        """[B, M]."""
        mean, std = (None, None) if self.video_dtype == torch.uint8 else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        pixels = x["prediction"], x["video"], x["masked_idx"]
        return ops.reconstruction_error(*pixels, kind=self.kind, normalize=self.normalize, mean=mean, std=std)

    def official(self, x: Tensors) -> Tensor:
        """[B, M]. Its autocast computes losses in fp32, from predictions cast to it."""
        prediction = x["prediction"].float()
        return official_error(prediction, x["normalised"], x["mask"], kind=self.kind, normalize=self.normalize)


@dataclass(frozen=True)
class SamplingLoss(OpCase):
    """Probabilities [B, N] and errors [B, M] -> a scalar. Ours takes log-probabilities, the official code p."""

    op = "sampling_loss"
    leaves = ("log_probs", "probs")

    @property
    def bytes(self) -> int:
        """Reads masked log-probabilities, indices and errors; writes a scalar and the gradient of all N."""
        masked = self.clips * self.masked * (_FP32 + _INDEX + _FP32)
        return {"forward+backward": masked + self.clips * self.tokens * _FP32 + 2 * _FP32}[self.direction]

    def make(self, device: torch.device) -> Tensors:
        """p and its log, errors and a mask."""
        log_probs = torch.randn(self.clips, self.tokens, device=device).log_softmax(1)
        sample = random_sample(self, device)
        return {
            "log_probs": log_probs,
            "probs": log_probs.exp(),
            "error": torch.rand(self.clips, self.masked, device=device),
            "masked_idx": sample.masked_idx,
            "mask": sample.mask,
        }

    def ours(self, x: Tensors) -> Tensor:
        """Scalar."""
        return ops.sampling_loss(x["log_probs"], x["masked_idx"], x["error"])

    def official(self, x: Tensors) -> Tensor:
        """Scalar."""
        return official_sampling_loss(x["probs"], x["mask"], x["error"])

    def gradients(self, out: Tensor, x: Tensors, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """The gradient of whichever of the leaves the implementation starts from."""
        leaves = [x[name] for name in self.leaves]
        found = torch.autograd.grad(out, leaves, x["cotangent"], retain_graph=retain_graph, allow_unused=True)
        return tuple(each for each in found if each is not None)

    def compare(self, x: Tensors) -> None:
        """Values, and gradients with respect to the scores that p is the softmax of: what the sampler gets."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for implementation in (self.ours, self.official):
            scores = x["log_probs"].detach().requires_grad_()
            log_probs = scores.log_softmax(1)
            outputs.append(implementation({**x, "log_probs": log_probs, "probs": log_probs.exp()}))
            gradients += torch.autograd.grad(outputs[-1], scores, x["cotangent"])
        self.expect_same("output", outputs[0], outputs[1], torch.float32)
        self.expect_same("gradient of the scores", gradients[0], gradients[1], torch.float32)


def random_sample(case: OpCase, device: torch.device) -> MaskSample:
    """K of N tokens of each clip, uniformly."""
    with ops.use_backend("torch"):
        return ops.draw_mask(torch.zeros(case.clips, case.tokens, device=device), case.visible)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
