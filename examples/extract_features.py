"""Writes the features of a folder or list of videos to a .safetensors or .npz file.

    python examples/extract_features.py --checkpoint model.safetensors --data videos/ --output features.safetensors
    python examples/extract_features.py --checkpoint videomae/ --data list.csv --output features.npz --pool none

The file has `features` ([V, D], or [V, N, D] for --pool none) and `label` ([V], -1 for a video without a label). It
also has the paths of the videos and the settings: as `path` and `settings` in .npz, as JSON in .safetensors metadata.
"""

from __future__ import annotations

import sys

from common.command_line import parse_settings
from evaluation.settings import ExtractionSettings
from video_data.video_files import VideoError


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        options = parse_settings(ExtractionSettings(), arguments, __doc__)
        from pipelines.extraction import run  # only now, since torch takes seconds to import

        run(options)
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
