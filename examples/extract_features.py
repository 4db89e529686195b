"""Writes the features of a folder or list of videos to a .safetensors or .npz file.

    python examples/extract_features.py --checkpoint model.safetensors --data videos/ --output features.safetensors
    python examples/extract_features.py --checkpoint videomae/ --data list.csv --output features.npz --pool none

The file has `features` ([V, D], or [V, N, D] for --pool none) and `label` ([V], -1 for a video without a label). It
also has the paths of the videos and the settings: as `path` and `settings` in .npz, as JSON in .safetensors metadata.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic_files import replacing, write_tensors
from common.command_line import parse_settings
from common.devices import make_accelerator
from common.report import report_left_out
from evaluation.features import FeatureSettings, Pool, frozen_encoder
from evaluation.multi_view import gather_views
from video_data.datasets import VideoDataset
from video_data.video import VideoError


@dataclass(frozen=True, kw_only=True)
class Options(FeatureSettings):
    """Settings of the extraction."""

    data: str = ""
    """Folder of videos, list file, shards, or 'sprites:LENGTH:SEED'."""
    output: Path = Path("features.safetensors")
    """File to write, .safetensors or .npz."""
    pool: Pool = "mean"
    """'mean': the mean of the tokens, averaged over the views. 'none': all tokens of one view."""


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        run(parse_settings(Options(), arguments, __doc__))
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


def run(options: Options) -> None:
    """Extracts and writes; raises ValueError, TypeError, FileNotFoundError or VideoError."""
    if options.output.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--output {options.output}: name a .safetensors or .npz file.")
    if options.output.exists():
        raise ValueError(f"--output {options.output} already exists; name another file, or delete it.")
    if not options.data:
        raise ValueError("--data is needed: a folder of videos or a list file.")
    if options.pool == "none" and options.clips * options.crops > 1:
        raise ValueError("--pool none keeps the tokens of one view; leave --clips and --crops at 1.")
    data = VideoDataset.find(options.data, options)
    accelerator = make_accelerator(options.precision)
    encoder = frozen_encoder(options, options.pool, accelerator)
    source = data.views(options, options.clips, options.crops)
    found = gather_views(encoder, source, accelerator, options.batch_size, options.workers)
    if not accelerator.is_main_process:
        return
    paths = [data.describe(number) for number in found.index.tolist()]
    tensors, settings = {"features": found.value, "label": found.label}, json.dumps(options.plain())
    if options.output.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with replacing(options.output) as aside, aside.open("wb") as file:
            np.savez(file, path=np.array(paths), settings=np.array(settings), **arrays)
    else:
        about = {"path": json.dumps(paths, ensure_ascii=False), "settings": settings}
        write_tensors(options.output, tensors, about)
    shape = " x ".join(map(str, found.value.shape))
    print(f"wrote features {shape} of {len(paths)} videos to {options.output}")
    report = options.output.with_name(f"{options.output.name}.left_out.txt")
    report_left_out(report, found.left_out, "could not be read and were left out")


if __name__ == "__main__":
    main(sys.argv[1:])
