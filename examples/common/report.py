"""Lines that the scripts print: settings, models, and the videos that were left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.settings import EncoderSettings

if TYPE_CHECKING:
    from adamae_sampler.models import AdaMAE, VideoClassifier


def describe_clips(settings: EncoderSettings) -> str:
    """Frames and size of a clip, on one line."""
    frames = f"stride {settings.stride}" if settings.sampling == "dense" else "one per segment"
    return (
        f"{settings.num_frames} frames, {settings.sampling} ({frames}), {settings.img_size[0]}x{settings.img_size[1]}"
    )


def describe_encoder(name: str, model: AdaMAE | VideoClassifier) -> str:
    """Name and size of a model, on one line."""
    size, blocks = model.size, model.encoder.blocks
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    width = model.encoder.pos_embed.shape[-1]
    return f"{name}, {millions:.3g}M parameters, width {width}, {len(blocks)} blocks, grid {size.grid}"


def format_lines(lines: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())


def check_output(output: Path, *new: str) -> None:
    """Raises ValueError if the output folder is a file, or already has one of the `new` files."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder.")
    if there := [name for name in new if (output / name).exists()]:
        raise ValueError(f"--output {output} already has {', '.join(there)}; name another folder, or delete the file.")


def report_left_out(report: Path, left_out: list[str], what: str) -> None:
    """Prints the videos that were left out and writes them to a file; removes an earlier file.

    Args:
        report: the file.
        left_out: a message for each video.
        what: continues the sentence "3 videos ...".
    """
    report.unlink(missing_ok=True)
    if not left_out:
        return
    print(f"{len(left_out)} videos {what} (also in {report}):")
    print("\n".join(f"  {message}" for message in left_out))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(left_out) + "\n", encoding="utf-8")
