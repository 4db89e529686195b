"""Linear or attentive probing: trains a classifier on the features of a frozen encoder.

    python examples/linear_probe.py --checkpoint model.safetensors --train train.csv --val val.csv
    python examples/linear_probe.py --checkpoint checkpoint.pth --train train.csv --val val.csv --sampling segments \\
        --random-clips 10 --clips 2 --crops 3                             augmented features, 2 x 3 views to test
    python examples/linear_probe.py --checkpoint model.safetensors --train sprites:1000:1 --val sprites:1000:2

Features are computed once, by all processes of `accelerate launch`, and kept in --cache. Probing again takes seconds.
The script writes results.json, per_class.csv, predictions.csv and probe.safetensors.
"""

from __future__ import annotations

import sys

from common.command_line import parse_settings
from evaluation.settings import ProbeSettings
from video_data.video_files import VideoError


def main(arguments: list[str]) -> float | None:
    """Runs the command line; returns top-1 in percent on the main process."""
    try:
        options = parse_settings(ProbeSettings(), arguments, __doc__)
        from pipelines.probing import run  # only now, since torch takes seconds to import

        return run(options)
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
