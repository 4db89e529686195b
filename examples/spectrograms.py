"""Adaptive masking of spectrograms: one channel, patches that are not square, and recordings of unequal length.

python examples/spectrograms.py     # half a minute on two CPU cores

Trains the reference model on generated recordings: a steady chord, and a burst of noise that nothing around it tells.
A recording fills its spectrogram from the start; tokens after its end are padding, and `valid` leaves them out. The
sampler learns to show the burst. The script prints how much of it is visible, and p(burst) / p(others); with
`main(sampling_weight=0)` that stays 1.
"""

from __future__ import annotations

import common.threads  # noqa: F401 - before torch

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from adamae_sampler.models import AdaMAE
from training.clip_loop import Clips, train_on_clips

BANDS, TIMES, HOP = 64, 256, 64  # of a spectrogram, and samples from one time to the next
PATCH = (8, 16)  # bands, times


def main(steps: int = 100, sampling_weight: float = 1e-3) -> list[float]:
    """Trains; returns p(burst) / p(other valid tokens) of each step."""
    torch.manual_seed(0)
    model = AdaMAE(
        img_size=(BANDS, TIMES), num_frames=1, patch_size=PATCH, tubelet_size=1, in_chans=1,
        embed_dim=96, depth=3, num_heads=3, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3,
        mask_ratio=0.8, score_network="pooled",
    )  # fmt: skip
    return train_on_clips(model.train(), recordings, "of a burst", steps, sampling_weight)


def recordings(generator: torch.Generator, number: int = 16) -> Clips:
    """Spectrograms [B, 1, 1, bands, times]. One is a clip of one frame."""
    time = torch.arange(TIMES * HOP)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, 1, generator=generator)

    pitch = uniform(0.1, 0.3)  # radians a sample
    chord = (pitch * time).sin() + (2 * pitch * time).sin() + (3 * pitch * time).sin()
    end, start = uniform(0.6, 1.0) * TIMES, uniform(0.1, 0.4) * TIMES
    at = torch.arange(TIMES)  # [times]
    recorded, burst = at < end, (at >= start) & (at < start + 40)
    noise = 3 * torch.randn(number, TIMES * HOP, generator=generator)
    sound = chord + noise * burst.repeat_interleave(HOP, 1)
    window = torch.hann_window(2 * BANDS)
    power = torch.stft(sound, 2 * BANDS, HOP, window=window, return_complex=True).abs()[:, :BANDS, :TIMES]
    level = (power + 0.1).log() * recorded[:, None]  # [B, bands, times]
    return Clips(level[:, None, None], of_tokens(recorded), of_tokens(burst))


def of_tokens(where: Tensor) -> Tensor:
    """[B, times] bool -> [B, N] bool, True for tokens with at least half of their times True."""
    columns = F.avg_pool1d(where.float(), PATCH[1]) >= 0.5  # [B, columns]
    return columns[:, None].expand(-1, BANDS // PATCH[0], -1).flatten(1)


if __name__ == "__main__":
    main()
