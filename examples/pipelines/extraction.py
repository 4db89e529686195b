"""Features of videos, written to a file. `extract_features.py` is its command line."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from common.atomic_files import replacing
from common.devices import make_accelerator
from common.report import report_left_out
from common.tensor_files import write_tensors
from evaluation.features import frozen_encoder
from evaluation.multi_view import gather_views
from evaluation.settings import ExtractionSettings
from video_data.datasets import VideoDataset
from video_data.sources import view_source


def run(options: ExtractionSettings) -> None:
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
    source = view_source(data, options, options.clips, options.crops)
    found = gather_views(encoder, source, accelerator, options.batch_size, options.readers)
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
