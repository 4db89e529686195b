"""What options may be set to, stated once more so that a command line is read without torch.

`tests/examples/test_start.py` compares every line with the package.
"""

from typing import Any, Literal

Masking = Literal["adaptive", "random", "tube", "frame", "block", "grid", "motion", "hard"]
SCORED_MASKINGS = ("adaptive", "hard")  # those with a score network
Network = Literal["mha", "mlp", "mlp_linear", "pooled"]
Estimator = Literal["categorical", "plackett_luce", "plackett_luce_max"]
FAST: dict[str, Any] = {"score_network": "pooled", "sample_from": "pixels", "decode_ratio": 0.5}

Autoencoder = Literal[
    "pretrain_adamae_vit_small_patch16_224",
    "pretrain_adamae_vit_base_patch16_224",
    "pretrain_adamae_vit_large_patch16_224",
]
Classifier = Literal["adamae_vit_small_patch16_224", "adamae_vit_base_patch16_224", "adamae_vit_large_patch16_224"]
