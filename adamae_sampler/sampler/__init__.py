"""Token samplers: modules from tokens [B, N, D] to a MaskSample. A reading map:

    base.py      TokenSampler: the interface, the checks, and masks that the caller passes
    scored.py    the base of samplers with a score network
    adaptive.py  learned: p from scores (AdaMAE)
    hard.py      learned: tokens that are predicted to be hard are hidden
    motion.py    p from the change between time steps
    fixed.py     random, tube, frame
    block.py     space-time blocks
    grid.py      a regular lattice
    schedule.py  Ramp, a number that changes over training
    draws.py     draws among valid tokens, uniform draws, and the masked tokens that are decoded
    maskings.py  the samplers by name, for models and scripts

All have the same call, so a training script compares them by changing one argument.
"""

from adamae_sampler.positions import GridSize
from adamae_sampler.sampler.adaptive import AdaptiveTokenSampler
from adamae_sampler.sampler.base import TokenSampler
from adamae_sampler.sampler.block import BlockTokenSampler
from adamae_sampler.sampler.draws import draw_decoded, draw_valid
from adamae_sampler.sampler.fixed import FrameTokenSampler, RandomTokenSampler, TubeTokenSampler
from adamae_sampler.sampler.grid import GridTokenSampler
from adamae_sampler.sampler.hard import HardTokenSampler
from adamae_sampler.sampler.maskings import MASKINGS, Masking, make_sampler, settings_of
from adamae_sampler.sampler.motion import MotionTokenSampler
from adamae_sampler.sampler.schedule import Ramp
from adamae_sampler.sampler.scored import ScoredTokenSampler

__all__ = [
    "AdaptiveTokenSampler",
    "BlockTokenSampler",
    "FrameTokenSampler",
    "GridSize",
    "GridTokenSampler",
    "HardTokenSampler",
    "MASKINGS",
    "Masking",
    "MotionTokenSampler",
    "Ramp",
    "RandomTokenSampler",
    "ScoredTokenSampler",
    "TokenSampler",
    "TubeTokenSampler",
    "draw_decoded",
    "draw_valid",
    "make_sampler",
    "settings_of",
]
