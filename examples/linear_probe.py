"""Linear or attentive probing: trains a classifier on the features of a frozen encoder.

    python examples/linear_probe.py --checkpoint model.safetensors --train train.csv --val val.csv
    python examples/linear_probe.py --checkpoint checkpoint.pth --train train.csv --val val.csv --sampling segments \\
        --random-clips 10 --clips 2 --crops 3                             augmented features, 2 x 3 views to test
    python examples/linear_probe.py --checkpoint model.safetensors --train sprites:1000:1 --val sprites:1000:2

Features are computed once, by all processes of `accelerate launch`, and kept in --cache. Probing again takes seconds.
The script writes results.json, per_class.csv, predictions.csv and probe.safetensors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from common.atomic_files import write_tensors
from common.command_line import parse_settings
from common.devices import make_accelerator
from common.report import check_output, report_left_out
from evaluation.features import FeatureSettings, Pool, cached_features
from evaluation.multi_view import Evaluation, write_results
from evaluation.probes import Probe, ProbeKind, ProbeRecipe, predict, train_probe
from video_data.datasets import LabelledData
from video_data.video import VideoError


@dataclass(frozen=True, kw_only=True)
class Options(FeatureSettings):
    """Settings of a probe."""

    train: str = ""
    """List of training videos, shards, or 'sprites:LENGTH:SEED'."""
    val: str = ""
    """List of videos for evaluation, shards, or 'sprites:LENGTH:SEED'."""
    output: Path = Path("runs/probe")
    """Folder for the results."""
    cache: Path = Path("runs/features")
    """Folder of the cached features."""
    random_clips: int = 0
    """Random clips of each training video, of random frames and with a MultiScaleCrop; each epoch takes one of them.
    0: the views of --clips and --crops, averaged, as for evaluation."""
    kind: ProbeKind = "linear"
    """'linear': batch norm without affine parameters, then a linear layer, on the mean of the tokens. 'attentive': the
    same on all tokens, pooled by a learned query."""
    probe: ProbeRecipe = field(default_factory=ProbeRecipe)
    """The training settings of the probe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(random_clips=0)


def main(arguments: list[str]) -> float | None:
    """Runs the command line; returns top-1 in percent on the main process."""
    try:
        options = parse_settings(Options(), arguments, __doc__)
        return run(options)
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


def run(options: Options) -> float | None:
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


if __name__ == "__main__":
    main(sys.argv[1:])
