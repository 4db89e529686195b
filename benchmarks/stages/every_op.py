"""Runs every kernel once, for compute-sanitizer, or the two largest at full size, for ncu.

compute-sanitizer python -m benchmarks.stages.every_op
ncu --kernel-name regex:_error_kernel python -m benchmarks.stages.every_op --full
"""

from __future__ import annotations

import argparse

import torch

from adamae_sampler import ops
from benchmarks.ops.base import Direction, OpCase
from benchmarks.ops.cases import AssembleTokens, DrawMask, GatherTokens, ReconstructionError, SamplingLoss

DONE = "every op ran"  # printed last, so that a program that watches this one knows it did not end early
_BF16, _UINT8 = torch.bfloat16, torch.uint8
_BOTH: Direction = "forward+backward"
_SMALL: tuple[OpCase, ...] = (
    DrawMask(2, 100, 7),
    DrawMask(1, 5000, 250),  # tokens in more than one tile
    GatherTokens(2, 100, 7, width=40),
    GatherTokens(2, 100, 7, "backward", width=40),
    AssembleTokens(2, 100, 7, width=40),
    AssembleTokens(2, 100, 7, "backward", width=40),
    AssembleTokens(2, 100, 7, "backward", width=40, order="restore"),
    ReconstructionError(2, 128, 7, _BOTH, _BF16, grid=(8, 4, 4), video_dtype=_UINT8),
    SamplingLoss(2, 100, 7, _BOTH),
)
_FULL: tuple[OpCase, ...] = (
    DrawMask(256, 1568, 78),
    DrawMask(256, 18432, 921),
    ReconstructionError(256, 1568, 78, _BOTH, _BF16, video_dtype=_UINT8),
)


def main(full: bool) -> None:
    """Runs the ops, then prints DONE."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in _FULL if full else _SMALL:
        case.call(case.ours, case.inputs(device))()
    if not full:
        # What a training step of one tokenizer and a drawn mask has of gradients besides.
        scores = torch.randn(2, 100, device=device, requires_grad=True)
        sample = ops.draw_mask(scores, 7)
        assert sample.log_probs is not None
        sample.log_probs.sum().backward()
        x = torch.randn(2, 100, 40, device=device)
        pos = torch.randn(1, 100, 40, device=device, requires_grad=True)  # one table for all clips: a sum of theirs
        ops.gather_tokens(x, sample.visible_idx, pos).sum().backward()
        # What the reference model is made of besides.
        video = torch.randint(256, (2, 3, 4, 32, 32), dtype=torch.uint8, device=device)
        ops.patch_tokens(video, patch_size=8)
        ops.patch_tokens(video, torch.arange(5, device=device).repeat(2, 1), patch_size=8)
        ops.thumbnails(video, patch_size=8, mean=[0.5] * 3, std=[0.2] * 3)
        weight = torch.ones(40, device=device, requires_grad=True)
        _, normed = ops.add_norm(x.requires_grad_(), x, weight, weight)
        ops.token_scores(normed, weight, weight[:1]).sum().backward()
        masked_idx = torch.arange(20, device=device).repeat(2, 1)
        layer = torch.randn(384, 40, device=device, requires_grad=True)
        ops.head_error(x[:, :20], layer, None, video, masked_idx, patch_size=8)[0].backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(DONE)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--full", action="store_true", help="draw_mask and the reconstruction error at full size")
    main(arguments.parse_args().full)
