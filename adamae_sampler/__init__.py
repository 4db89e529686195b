"""Adaptive masking for masked autoencoders. A reading map:

    mask.py        MaskSample, and the number of tokens that a mask ratio leaves visible
    sampler/       tokens [B, N, D] -> MaskSample: adaptive, hard, motion, random, tube, frame, block, grid
    positions.py   position tables at other grids
    networks.py    the score networks of the learned samplers
    transformer.py the blocks of all networks here
    attention.py   their attention, and the choice of torch's kernels for it
    estimators.py  the log-probability of a set of tokens, for the exact policy gradient
    losses.py      reconstruction error, sampling loss, and both together; ranking loss
    ops/           the operations underneath, one file each
    integrations/  patch and unpatch, one file for each host
    models/        the reference encoder-decoder on timm's blocks, checkpoint formats
    visualize/     pictures of masks, probabilities and errors (needs matplotlib; import it by name)
    env.py         versions and devices for a bug report: python -m adamae_sampler.env

Data flows one way: models, integrations -> sampler, losses -> ops -> mask.
"""

from adamae_sampler import integrations, models, ops
from adamae_sampler.integrations import patch, unpatch
from adamae_sampler.losses import AdaMAELoss, ranking_loss, reconstruction_error, sampling_loss
from adamae_sampler.mask import MaskSample
from adamae_sampler.sampler import (
    AdaptiveTokenSampler,
    BlockTokenSampler,
    FrameTokenSampler,
    GridTokenSampler,
    HardTokenSampler,
    MotionTokenSampler,
    Ramp,
    RandomTokenSampler,
    TubeTokenSampler,
)

__version__ = "0.2.0"

__all__ = [
    "AdaMAELoss",
    "AdaptiveTokenSampler",
    "BlockTokenSampler",
    "FrameTokenSampler",
    "GridTokenSampler",
    "HardTokenSampler",
    "MaskSample",
    "MotionTokenSampler",
    "Ramp",
    "RandomTokenSampler",
    "TubeTokenSampler",
    "integrations",
    "models",
    "ops",
    "patch",
    "ranking_loss",
    "reconstruction_error",
    "sampling_loss",
    "unpatch",
]
