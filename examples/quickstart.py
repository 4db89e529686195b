"""Adaptive masking in a Hugging Face VideoMAE, in one line: pip install transformers.

python examples/quickstart.py     # three minutes on two CPU cores

Trains a small VideoMAE on clips of a sprite that moves over a still background, and prints how the sampler learns to
show what moves: p on moving tokens over p on still ones, and the share of visible tokens that move beside that of all.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from adamae_sampler import patch
from video_data.sprites import Sprites


def main(steps: int = 200) -> float:
    """Returns how much likelier the sampler shows a token that moves than a still one."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
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
    model: Any = patch(VideoMAEForPreTraining(config), mask_ratio=0.95)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mean, std = (torch.tensor(each).view(3, 1, 1, 1) for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    ratio = 1.0
    for step, batch in enumerate(DataLoader(Sprites(length=16 * steps), batch_size=16)):
        pixel_values = ((batch["video"] / 255 - mean) / std).transpose(1, 2)  # [B, T, C, H, W], as Hugging Face has it
        output = model(pixel_values)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()

        sample, reconstruction, sampling = model.last_step
        moving = batch["moving"]
        p = sample.log_probs.exp()
        ratio = (p[moving].mean() / p[~moving].mean()).item()
        if step % 20 == 0 or step == steps - 1:
            shown, share = moving[~sample.mask].float().mean(), moving.float().mean()
            print(f"step {step}: reconstruction {reconstruction:.4f}, sampling {sampling:.4f};", end=" ")
            print(f"{shown:.0%} of the visible tokens move, {share:.0%} of all; p {ratio:.1f} times as large")
    return ratio


if __name__ == "__main__":
    main()
