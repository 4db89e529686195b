"""Each process of a pre-training draws masks of its own. test_launch.py tests that all else is as on one process."""

from functools import partial

import pytest
import torch
from forked import run_group
from scripts import TINY_PRETRAIN, run_patched

DRAWN = """
def patched(self, video, **kwargs):
    prediction, sample = forward(self, video, **kwargs)
    path = os.path.join(os.path.dirname(__file__), f"{os.environ['RANK']}.pt")
    counted = type(sample.visible_idx) is not torch.Tensor  # shapes alone, for the FLOPs
    if not counted and not os.path.exists(path): torch.save((sample.visible_idx, torch.zeros(1) + self.mask_token.sum()), path)
    return prediction, sample
"""


@pytest.mark.slow
def test_every_process_draws_masks_of_its_own(tmp_path):
    arguments = [
        *TINY_PRETRAIN,
        "--data",
        "sprites:64",
        "--steps",
        1,
        "--masking",
        "random",
        "--output",
        tmp_path / "run",
    ]
    run_patched(DRAWN, tmp_path, *arguments, start=partial(run_group, 2))
    (first, weights), (second, same_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(weights, same_weights)
    assert not (first == second).all(1).any()
