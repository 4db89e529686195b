"""A short training loop on images of sprites, for the examples of masked autoencoders for images."""

from __future__ import annotations

import torch
from torch import nn

from adamae_sampler import AdaMAELoss
from video_data.sprites import Sprites


def train_on_images(model: nn.Module, patch_size: int | tuple[int, int], steps: int) -> list[float]:
    """Trains on batches of 16 images and returns the reconstruction loss of each step.

    Args:
        model: images [B, 3, 64, 64] in 0..1 -> prediction and sample, as `AdaMAELoss` takes them.
        patch_size: side of a patch in pixels.
        steps: optimiser steps.
    """
    criterion = AdaMAELoss(patch_size=patch_size, tubelet_size=1, normalize=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clips = Sprites()
    losses = []
    for step in range(steps):
        images = torch.stack([clips[16 * step + i]["video"][:, 0] for i in range(16)]) / 255  # [16, 3, 64, 64]
        prediction, sample = model(images)
        out = criterion(prediction, images.unsqueeze(2), sample)  # an image is a video of one frame
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.reconstruction.item())
        if step % 10 == 0:
            print(f"step {step}: reconstruction {out.reconstruction:.4f}, sampling {out.sampling:.4f}")
    return losses
