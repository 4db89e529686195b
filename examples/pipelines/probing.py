"""Probing: features, then a classifier on them. `linear_probe.py` is its command line."""

from __future__ import annotations

import json
from typing import Any

from accelerate.utils import set_seed

from common.devices import make_accelerator
from common.report import check_output, report_left_out
from common.tensor_files import write_tensors
from evaluation.features import cached_features
from evaluation.multi_view import Evaluation, write_results
from evaluation.probes import Probe, predict, train_probe
from evaluation.settings import Pool, ProbeSettings
from video_data.datasets import LabelledData


def run(options: ProbeSettings) -> float | None:
    """Computes features, trains and evaluates; raises ValueError, TypeError, FileNotFoundError or VideoError."""
    check_output(options.output, "results.json")
    if not options.train or not options.val:
        raise ValueError("--train and --val are needed: lists of videos, or 'sprites:1000:1' and 'sprites:1000:2'.")
    if options.kind == "attentive" and options.clips * options.crops > 1:
        raise ValueError("--kind attentive takes the tokens of one view; leave --clips and --crops at 1.")
    data = LabelledData.find(options.train, options.val, options)
    accelerator = make_accelerator(options.precision)
    if accelerator.is_main_process:
        print(f"{'classes':>13}  {data.describe_classes()}")
    pool: Pool = "mean" if options.kind == "linear" else "none"
    features = cached_features(options, data.train, pool, options.cache, accelerator, options.random_clips)
    test = cached_features(options, data.val, pool, options.cache, accelerator)
    if not accelerator.is_main_process:
        return None

    set_seed(options.seed)
    probe = Probe(options.kind, features.values.shape[-1], len(data.names))
    loss = train_probe(probe, options.kind, features, options.probe, accelerator.device)
    probabilities = predict(probe, test, accelerator.device)
    result = Evaluation(test.index, test.label, probabilities, [*data.val_left_out, *test.left_out])
    settings: dict[str, Any] = {
        "kind": options.kind,
        "checkpoint": options.checkpoint,
        "train": options.train,
        "val": options.val,
    }
    views = {"random_clips": options.random_clips, "clips": options.clips, "crops": options.crops}
    settings |= {**views, "seed": options.seed, "train_loss": loss}
    write_results(options.output, result, data.names, data.val.describe, settings)
    write_tensors(options.output / "probe.safetensors", probe.state_dict(), {"settings": json.dumps(options.plain())})
    print(f"{options.kind} probe: {result.headline()}, training loss {loss:.3f}; wrote {options.output}")
    left_out = [*data.train_left_out, *features.left_out, *result.left_out]
    again = f"could not be used and were left out (delete the folder in {options.cache} to try them again)"
    report_left_out(options.output / "left_out.txt", left_out, again)
    return 100 * result.top(1)
