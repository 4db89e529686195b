"""Pre-training on several processes: the same as on one with the same effective batch, but for what is drawn."""

import pytest
import safetensors.torch
import torch
from scripts import FIXED_MASKS, TINY_PRETRAIN, TWO_PROCESSES, metrics, newest_checkpoint, run_patched


def test_two_processes_train_as_one_with_the_same_effective_batch(tmp_path):
    """Accumulated gradients besides: test_launch.py."""
    common = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 20, "--effective-batch", 8]
    for name, batch, launcher in (
        ("one", 8, ()),
        ("two", 4, TWO_PROCESSES),
    ):
        arguments = [*common, "--batch-size", batch, "--output", tmp_path / name / "run"]
        run_patched(FIXED_MASKS, tmp_path / name, *arguments, launcher=launcher)
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        for name in ("loss", "reconstruction", "sampling", "lr"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), (mine["step"], name)
    ours, others = (safetensors.torch.load_file(newest_checkpoint(folder)) for folder in (one, two))
    names = [name for name in ours if name.startswith("/model/")]
    assert len(names) > 40
    for name in names:
        torch.testing.assert_close(ours[name], others[name], rtol=0, atol=1e-5, msg=name)


DRAWN = """
def patched(self, video, **kwargs):
    prediction, sample = forward(self, video, **kwargs)
    path = os.path.join(os.path.dirname(__file__), f"{os.environ['RANK']}.pt")
    counted = type(sample.visible_idx) is not torch.Tensor  # shapes alone, for the FLOPs
    if not counted and not os.path.exists(path): torch.save((sample.visible_idx, torch.zeros(1) + self.mask_token.sum()), path)
    return prediction, sample
"""


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
    run_patched(DRAWN, tmp_path, *arguments, launcher=TWO_PROCESSES)
    (first, weights), (second, same_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(weights, same_weights)
    assert not (first == second).all(1).any()
