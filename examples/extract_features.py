"""Writes the features of a folder or list of videos to a .safetensors or .npz file.

    python examples/extract_features.py --checkpoint model.safetensors --data videos/ --output features.safetensors
    python examples/extract_features.py --checkpoint videomae/ --data list.csv --output features.npz --pool none

The file has `features` ([V, D], or [V, N, D] for --pool none), `label` ([V], -1 where there is none) and the paths of
the videos: as `path` in .npz, as JSON in the metadata of .safetensors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate.utils import gather_object

from common.cli import parse_settings
from common.engine import make_accelerator, report_left_out
from common.evaluation import map_views
from common.features import FeatureSettings, Pool, frozen_encoder
from common.sources import Labelled


@dataclass(frozen=True, kw_only=True)
class Options(FeatureSettings):
    """Settings of the extraction."""

    data: str = ""
    """Folder of videos, list file, or 'sprites:LENGTH:SEED'."""
    output: Path = Path("features.safetensors")
    """File to write, .safetensors or .npz."""
    pool: Pool = "mean"
    """'mean' of the tokens, averaged over the views; 'none' for all tokens of one view."""


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        run(parse_settings(Options(), arguments, __doc__))
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def run(options: Options) -> None:
    """Extracts and writes; raises ValueError, TypeError or FileNotFoundError for what cannot be run."""
    if options.output.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--output {options.output}: name a .safetensors or .npz file.")
    if options.output.exists():
        raise ValueError(f"--output {options.output} exists already; name another file, or delete it.")
    if not options.data:
        raise ValueError("--data is needed: a folder of videos or a list file.")
    if options.pool == "none" and options.clips * options.crops > 1:
        raise ValueError("tokens of several views have no common place; leave --clips and --crops at 1.")
    data = Labelled.find(options.data, options)
    accelerator = make_accelerator(options.precision)
    encoder = frozen_encoder(options, options.pool, accelerator)
    source = data.views(options, options.clips, options.crops)
    batches = map_views(encoder, source, accelerator, options.batch_size, options.workers)
    parts = gather_object([(batch.index, batch.label, batch.value.cpu(), batch.left_out) for batch in batches])
    if not accelerator.is_main_process:
        return
    left_out = sorted(message for part in parts for message in part[3])
    read = [part for part in parts if len(part[0])]
    if not read:
        raise ValueError("no video could be read:\n  " + "\n  ".join(left_out[:8]))
    index, label, features = (torch.cat([part[column] for part in read]) for column in range(3))
    order = index.argsort()
    paths = [data.describe(number) for number in index[order].tolist()]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.suffix == ".npz":
        np.savez(options.output, features=features[order].numpy(), label=label[order].numpy(), path=np.array(paths))
    else:
        tensors = {"features": features[order].contiguous(), "label": label[order]}
        metadata = {"format": "pt", "path": json.dumps(paths, ensure_ascii=False)}
        safetensors.torch.save_file(tensors, options.output, metadata=metadata)
    shape = " x ".join(map(str, features.shape))
    print(f"wrote features {shape} of {len(paths)} videos to {options.output}")
    report_left_out(
        options.output.with_name(f"{options.output.name}.left_out.txt"), left_out, "could not be read and were left out"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
