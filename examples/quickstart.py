"""Adaptive masking in a Hugging Face VideoMAE, in one line: pip install transformers.

python examples/quickstart.py     # three minutes on two CPU cores

Trains a small VideoMAE on clips of a sprite that moves over a still background. The sampler learns to show the moving
tokens. The script prints p(moving) / p(still), and the share of moving tokens among the visible and among all tokens.
The masks of the first step are random ones. With `patch(..., sampling_weight=0)` they stay so.
`tour.ipynb` does the same with pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from adamae_sampler import patch
from video_data.sprites import Sprites


def main(steps: int = 200, sampling_weight: float = 1e-4, seed: int = 0) -> float:
    """Trains; returns p(moving) / p(still) of the last step, for a moving and a still token."""
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


def train(model: Any, steps: int, batch_size: int = 16) -> list[float]:
    """Trains a patched model on generated clips; returns p(moving) / p(still) of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ratios = []
    for step, batch in enumerate(DataLoader(Sprites(length=batch_size * steps), batch_size=batch_size)):
        output = model(pixel_values(batch["video"]))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

        sample, reconstruction, sampling = model.last_step
        moving = batch["moving"]
        p = sample.log_probs.exp()
        ratios.append((p[moving].mean() / p[~moving].mean()).item())
        if step % 20 == 0 or step == steps - 1:
            shown, share = moving[~sample.mask].float().mean(), moving.float().mean()
            print(f"step {step}: reconstruction {reconstruction:.4f}, sampling {sampling:.4f};", end=" ")
            print(f"{shown:.0%} of the visible tokens move, {share:.0%} of all; p {ratios[-1]:.1f} times as large")
    return ratios


def pixel_values(video: Tensor) -> Tensor:
    """[B, C, T, H, W] uint8 -> [B, T, C, H, W] normalised, as Hugging Face models expect."""
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((video / 255 - mean) / std).transpose(1, 2)


if __name__ == "__main__":
    main()
