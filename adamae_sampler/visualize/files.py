"""Animations as files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_animation(frames: Tensor, path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Writes [T, H, W, 3] uint8 frames as a .gif (with Pillow) or an .mp4 (with PyAV, which must be installed).

    Raises:
        ValueError: the suffix is another, or the frames have another dtype or shape.
        ImportError: PyAV is not installed.
    """
    path = Path(path)
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 [T, H, W, 3].")
    if path.suffix == ".gif":
        images = [Image.fromarray(frame.cpu().numpy()) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    elif path.suffix == ".mp4":
        try:
            import av
        except ImportError as error:
            raise ImportError("an .mp4 needs PyAV: pip install av, or name a .gif file.") from error

        height, width = (size // 2 * 2 for size in frames.shape[1:3])  # H.264 takes even sizes
        with av.open(os.fspath(path), "w") as container:
            stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in frames[:, :height, :width].cpu():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")))
            container.mux(stream.encode(None))
    else:
        raise ValueError(f"{path} has another suffix than expected; name a .gif or .mp4 file.")
