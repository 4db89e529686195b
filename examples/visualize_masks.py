"""Pictures of the masks and predictions of a pre-trained model: the paper's Figures 2 to 14 for any video.

    python examples/visualize_masks.py --checkpoint runs/demo/model.safetensors --video sprites:4
    python examples/visualize_masks.py --checkpoint checkpoint.pth --video clip.webm --mask-ratios 0.95 --leak-free

For a mask ratio of 0.95 the script writes overview_95.png (video, prediction, error, p, mask) and animation_95.gif or
.mp4 (the same, frame by frame). masks.png shows the video, p and the masks of all ratios. A prediction of normalised
pixels takes brightness and contrast from the true patch, and its label says so. --leak-free takes them from the visible
patches.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from common.checkpoint_header import stated_recipe, stated_sizes
from common.command_line import checkpoint_of, parse_settings
from common.settings import DECODER_SIZES
from evaluation.settings import PictureSettings
from training.pretrain_recipe import SAMPLER_SETTINGS
from video_data.video_files import VideoError


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    try:
        checkpoint = checkpoint_of(arguments)
        said, sizes = stated_recipe(checkpoint), stated_sizes(checkpoint)
        start = replace(PictureSettings(), **{name: sizes[name] for name in DECODER_SIZES if name in sizes})
        target = ("masking", *SAMPLER_SETTINGS, "normalize_target", "loss", "stride", "sampling")
        start = replace(start, **{name: said[name] for name in target if name in said})
        options = parse_settings(start, arguments, __doc__)
        from pipelines.pictures import run  # only now, since torch takes seconds to import

        run(options)
    except (ValueError, TypeError, FileNotFoundError, VideoError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
