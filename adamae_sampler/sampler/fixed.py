"""Random, tube and frame masks."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_sampler.mask import MaskSample, num_masked_units
from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.draws import draw_uniform, whole_units


class RandomTokenSampler(TokenSampler):
    """Shows K tokens; every set of K is equally likely, as in MAE and MAE-ST. K = floor(N (1 - ratio))."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.9, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws K of N tokens uniformly."""
        num_visible = self.num_drawn(grid_size)
        return draw_uniform(tokens, self.num_masks, tokens.shape[1], num_visible, generator, valid)


class TubeTokenSampler(TokenSampler):
    """Masks the same random spatial positions in all time steps: floor(H W ratio) of them, as VideoMAE rounds."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.9, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)

    def num_visible_at(self, grid_size: GridSize) -> int:
        """K at a grid: the visible positions of a frame, in all frames."""
        positions = grid_size[1] * grid_size[2]
        masked = num_masked_units(positions, self.mask_ratio, "spatial positions in a frame")
        return grid_size[0] * (positions - masked)

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws spatial positions uniformly, then repeats them over time. Of `valid` it needs whole tubes."""
        frames, height, width = grid_size or self.grid_size
        positions = height * width
        visible_positions = self.num_drawn(grid_size) // frames
        whole = whole_units(valid, (frames, positions), 1, visible_positions, "positions, valid at all time steps,")
        frame = draw_uniform(tokens, self.num_masks, positions, visible_positions, generator, whole)
        start = torch.arange(frames, device=tokens.device)[:, None] * positions  # [T, 1]
        return MaskSample(
            visible_idx=(start + frame.visible_idx[:, None]).flatten(1),  # [B, T, positions] -> [B, K]
            masked_idx=(start + frame.masked_idx[:, None]).flatten(1),
            mask=frame.mask.repeat(1, frames),
        )


class FrameTokenSampler(TokenSampler):
    """Masks whole time steps: floor(T ratio) of them, so a ratio of 0.95 masks 7 of 8."""

    def __init__(self, grid_size: GridSize, mask_ratio: float = 0.875, num_masks: int = 1) -> None:
        super().__init__(grid_size, mask_ratio, num_masks)
        self.num_visible = self.num_visible_at(self.grid_size)

    def num_visible_at(self, grid_size: GridSize) -> int:
        """K at a grid: all positions of the visible time steps."""
        frames, height, width = grid_size
        return (frames - num_masked_units(frames, self.mask_ratio, "time steps")) * height * width

    def draw(
        self,
        tokens: Tensor,
        generator: torch.Generator | None,
        *,
        grid_size: GridSize | None = None,
        valid: Tensor | None = None,
    ) -> MaskSample:
        """Draws time steps uniformly; all spatial positions of a step go with it. Of `valid` it needs whole steps."""
        frames, height, width = grid_size or self.grid_size
        positions = height * width
        visible_frames = self.num_drawn(grid_size) // positions
        whole = whole_units(valid, (frames, positions), 2, visible_frames, "time steps, all of whose tokens are valid,")
        steps = draw_uniform(tokens, self.num_masks, frames, visible_frames, generator, whole)
        position = torch.arange(positions, device=tokens.device)  # [positions]
        return MaskSample(
            # [B, steps, positions] -> [B, K]
            visible_idx=(steps.visible_idx[:, :, None] * positions + position).flatten(1),
            masked_idx=(steps.masked_idx[:, :, None] * positions + position).flatten(1),
            mask=steps.mask.repeat_interleave(positions, dim=1),
        )
