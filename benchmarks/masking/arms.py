"""The arms of the comparison, the sizes in which it is made, and its question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adamae_sampler.models import PRESETS
from benchmarks.masking import objectives, samplers
from benchmarks.masking.atari import LABELS, game
from benchmarks.masking.clips import COARSE
from benchmarks.masking.objectives import Objective, rewarded
from benchmarks.masking.train import Setting


@dataclass(frozen=True)
class Arm:
    """One way to mask.

    Attributes:
        about: for the table.
        model: arguments of `AdaMAE`.
        loss: arguments of `AdaMAELoss`.
        objective: what is minimised.
    """

    about: str
    model: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = objectives.plain


def _rewarded(about: str, reward: Callable[[Tensor], Tensor], **sampler: Any) -> Arm:
    return Arm(f"learned; reward: {about}", {"masking": samplers.learned(**sampler)}, objective=rewarded(reward))


REFERENCE = "random"
UNTRAINED, SUPERVISED = "untrained", "supervised"
ARMS: Mapping[str, Arm] = {
    UNTRAINED: Arm("the encoder as it is initialised", {"masking": "random"}),
    SUPERVISED: Arm("the encoder trained on such labels", {"masking": "random"}),
    REFERENCE: Arm("every token equally likely", {"masking": "random"}),
    "exact": Arm("the paper's learned sampler", {"masking": "adaptive"}),
    "motion": Arm("p in proportion to the change of the pixels, floor 0.2; not learned", {"masking": "motion"}),
    "motion_half": Arm("as motion, floor 0.5", {"masking": samplers.motion(0.5)}),
    "motion_low": Arm("as motion, floor 0.8", {"masking": samplers.motion(0.8)}),
    "hiding": Arm("p in inverse proportion to that of motion_low; not learned", {"masking": samplers.hiding(0.8)}),
    "fast": Arm(
        "preset fast: pooled scores from pixels, half of the masked tokens decoded",
        {"masking": "adaptive", **PRESETS["fast"]},
    ),
    "tube": Arm("the same places at every time step; more tokens are visible than the ratio asks", {"masking": "tube"}),
    "frame": Arm("whole time steps; more tokens are visible than the ratio asks", {"masking": "frame"}),
    "block": Arm("space-time blocks", {"masking": "block"}),
    "grid": Arm("a regular lattice", {"masking": "grid"}),
    "hard": Arm("hides what is predicted to be hard, ever more of it", {"masking": samplers.hard}),
    "plackett_luce": Arm(
        "the policy gradient of the expected error",
        {"masking": "adaptive"},
        {"estimator": "plackett_luce", "sampling_weight": 1.0},
    ),
    "plackett_luce_detached": Arm(
        "as plackett_luce, with no gradient to the tokens that the network sees",
        {"masking": samplers.learned(detach_tokens=True)},
        {"estimator": "plackett_luce", "sampling_weight": 1.0},
    ),
    "plackett_luce_max": Arm(
        "as plackett_luce, with the other sign",
        {"masking": "adaptive"},
        {"estimator": "plackett_luce_max", "sampling_weight": 1.0},
    ),
    "standardised": _rewarded(
        "errors standardised within a clip; 20% exploration", objectives.standardised, exploration=0.2
    ),
    "ranked": _rewarded("ranks of the errors within a clip", objectives.ranked),
    "sharpened": _rewarded("errors to the fourth power", objectives.sharpened),
    "inverted": _rewarded("one over the error", objectives.inverted),
    "contrast": Arm(
        "learned; reward: the normalised error times the variance of its patch",
        {"masking": samplers.learned()},
        objective=objectives.contrast,
    ),
    "reducible": Arm(
        "learned; reward: error of a slow copy of the model, less the model's, standardised; 20% exploration",
        {"masking": samplers.learned(exploration=0.2)},
        objective=objectives.reducible,
    ),
    "target_set": Arm(
        "policy gradient of the error of random tokens that a step does not show",
        {"masking": samplers.learned(samplers.TargetSetSampler)},
        objective=objectives.of_targets,
    ),
    "even_start": Arm("learned; all scores start at 0", {"masking": samplers.even_start()}),
    "ramp": Arm("learned; from random masks to 10% exploration in half of the run", {"masking": samplers.ramped}),
    "cold": Arm("learned; temperature 0.25", {"masking": samplers.learned(temperature=0.25)}),
    "motion_prior": Arm("learned; starts as motion_low", {"masking": samplers.even_start(samplers.MotionPriorSampler)}),
}

# The question: see README.md of this folder.
PRIMARY = (REFERENCE, "exact", "motion")
ASKED = ("cpu", "gpu", "smoke")  # sizes; of the others, all arms are exploration
COMPARED = ("exact", "motion")  # with random masking, under Holm's correction
SEEDS = tuple(range(5))
SECOND_SEEDS = (3, 4, 5, 6, 7)  # of the second question: exact - random with raw targets, also at twice the length
MARGIN = 0.005  # of the equivalence of fast and exact, in the units of the primary endpoint

_TINY = {
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 3,
    "decoder_embed_dim": 64,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
SETTINGS: Mapping[str, Setting] = {
    "cpu": Setting(steps=2000, batch=16, lr=1e-3, mask_ratio=0.9, clips=8192, probe_clips=2000, model=_TINY),
    "coarse": Setting(
        steps=3000, batch=32, lr=1e-3, mask_ratio=0.9, clips=8192, probe_clips=2000, model=_TINY, cut=COARSE
    ),
    **{
        name: Setting(
            steps=2000, batch=16, lr=1e-3, mask_ratio=0.9, clips=6000, probe_clips=1000, model=_TINY, cut=game(name)
        )
        for name in LABELS
    },
    "gpu": Setting(steps=4000, batch=64, lr=1e-3, mask_ratio=0.9, clips=16384, probe_clips=2000, model=_TINY),
    "smoke": Setting(
        steps=3,
        batch=4,
        lr=2e-3,
        mask_ratio=0.9,
        clips=8,
        probe_clips=64,
        few_steps=2,
        model={**_TINY, "embed_dim": 24, "depth": 1, "decoder_embed_dim": 16},
    ),
}
