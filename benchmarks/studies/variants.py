"""The variants that benchmarks.study compares, and the sizes of its clips and models. Add your own here."""

from __future__ import annotations

from typing import Literal

_POOLED = ["--score-network", "pooled"]
_PIXELS = [*_POOLED, "--sample-from", "pixels"]
_FAST = ["--fast"]
_MASKS = ["--num-masks", "4"]
SCRATCH = "scratch"  # no pre-training: the weights that it starts from
VARIANTS: dict[str, list[str]] = {
    "random": ["--masking", "random"],
    "tube": ["--masking", "tube"],
    "frame": ["--masking", "frame"],
    "block": ["--masking", "block"],
    "grid": ["--masking", "grid"],
    "motion": ["--masking", "motion"],
    "hard": ["--masking", "hard"],
    "exact": [],
    "pooled": _POOLED,
    "pixels": _PIXELS,
    "half": ["--decode-ratio", "0.5"],
    "fast": _FAST,
    "random-fast": ["--masking", "random", "--sample-from", "pixels", "--decode-ratio", "0.5"],
    "masks4": _MASKS,
    "plackett-luce": [*_MASKS, "--estimator", "plackett_luce"],
    "plackett-luce-max": [*_MASKS, "--estimator", "plackett_luce_max"],
    "plackett-luce-weight1": [*_MASKS, "--estimator", "plackett_luce", "--sampling-weight", "1"],
    "fast-exploration": [*_FAST, "--exploration", "0.1"],
    "fast-temperature": [*_FAST, "--temperature", "2"],
    SCRATCH: ["--masking", "random", "--base-lr", "0", "--min-base-lr", "0"],
}
Size = Literal["small", "medium", "gpu", "real", "tiny"]
SIZES: dict[Size, str] = {
    "small": "--preset sprites",
    "medium": "--preset sprites --img-size 64 64 --num-frames 16 --embed-dim 192 --depth 4 --num-heads 4 "
    "--decoder-embed-dim 96 --mask-ratio 0.95 --warmup-steps 20",
    "gpu": "--preset sprites --img-size 112 112 --num-frames 16 --embed-dim 384 --depth 12 --num-heads 6 "
    "--decoder-embed-dim 192 --decoder-depth 4 --mask-ratio 0.95 --batch-size 128",
    "real": "--preset demo",
    # For normalised targets, which are learned late: nothing of them shows in a patch's mean colour, so the decoder has
    # to find the same place at another time and copy it. Small patches have less to copy, and the rate stays high.
    "tiny": "--preset sprites --img-size 16 16 --patch-size 4 --mask-ratio 0.75 --min-base-lr 8e-3",
}
TITLES: dict[str, str] = {
    "small": "64 tokens",
    "medium": "512 tokens",
    "gpu": "1568 tokens",
    "real": "the bundled video",
    "tiny": "64 tokens of 4 x 4 pixels",
}


def variants_help() -> str:
    """A line for each variant: the options of pretrain.py that it is."""
    return "\n".join(f"    {name:24}{' '.join(options) or '(defaults)'}" for name, options in VARIANTS.items())
