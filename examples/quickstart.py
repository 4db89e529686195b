"""Adaptive masking in a Hugging Face VideoMAE, in one line.

python examples/quickstart.py     # three minutes on two CPU cores

Trains a small VideoMAE on clips in which one sprite moves over a textured background, and another stays still. The
script prints p of what moves, of the still sprite and of the background, each as a multiple of an even p. In the first
step all are 1, so the masks are random ones; p moves within the first hundred steps. With `patch(...,
sampling_weight=0)` it stays even.
`tour.ipynb` does the same with pictures.
"""

from __future__ import annotations

import common.threads  # noqa: F401 - before torch

# isort: split
from typing import Any

import torch
import tyro
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from adamae_sampler import patch
from video_data.sprites import Sprites


def main(steps: int = 200, sampling_weight: float = 1e-4, seed: int = 0) -> dict[str, float]:
    """Trains; returns the `shares` of the last step."""
    torch.manual_seed(seed)
    model: Any = patch(VideoMAEForPreTraining(small_config()), mask_ratio=0.95, sampling_weight=sampling_weight)
    return train(model, steps)[-1]


def small_config() -> VideoMAEConfig:
    """A VideoMAE for clips of 16 frames of 64 x 64 pixels: 8 x 8 x 8 tokens."""
    return VideoMAEConfig(
        image_size=64,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        norm_pix_loss=False,
    )


def train(model: Any, steps: int, batch_size: int = 16) -> list[dict[str, float]]:
    """Trains a patched model on generated clips; returns the `shares` of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step, batch in enumerate(DataLoader(Sprites(length=batch_size * steps), batch_size=batch_size)):
        output = model(pixel_values(batch["video"]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

        sample, reconstruction, sampling = model.last_step
        history.append(shares(sample.log_probs, batch))
        if step % 20 == 0 or step == steps - 1:
            p = ", ".join(f"{kind} {share:.1f}" for kind, share in history[-1].items())
            print(f"step {step}: reconstruction {reconstruction:.4f}, sampling {sampling:.4f}; p over an even p: {p}")
    return history


def shares(log_probs: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """Mean p [B, N] of the tokens of each kind, as a multiple of an even p: 1 if all tokens are equally likely."""
    moving, still = batch["moving"], batch["still"]
    kinds = {"moving": moving, "still sprite": still, "background": ~(moving | still)}
    p = log_probs.exp() * log_probs.shape[1]
    return {name: p[kind].mean().item() for name, kind in kinds.items()}


def pixel_values(video: Tensor) -> Tensor:
    """[B, C, T, H, W] uint8 -> [B, T, C, H, W] normalised, as Hugging Face models expect."""
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((video / 255 - mean) / std).transpose(1, 2)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
