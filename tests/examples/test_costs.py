"""Operations, utilisation and memory of a training step, against independent numbers."""

import pytest
import timm
import torch

import adamae_sampler.models  # noqa: F401 - registers them with timm
from training.throughput import forward_flops, memory_gib, peak_of, utilisation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("masking", "ratio", "gmacs"),
    [("adaptive", 0.95, 43.0), ("random", 0.95, 28.1), ("tube", 0.9, 35.4)],
)
def test_operations_of_vit_b_are_those_counted_by_hand(masking, ratio, gmacs):
    """The reference numbers are multiplications of tokenizer, sampler, encoder, decoder and head, from their sizes."""
    model = timm.create_model("pretrain_adamae_vit_base_patch16_224", masking=masking, mask_ratio=ratio)
    assert forward_flops(model, 1, 3, 16, 224, 224) / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_a_fused_head_costs_as_many_operations():
    whole, fused = (timm.create_model("pretrain_adamae_vit_small_patch16_224", fused_head=n) for n in (False, True))
    size = (1, 3, 16, 224, 224)
    assert forward_flops(fused.train(), *size) == forward_flops(whole.train(), *size)


def test_counting_has_no_effect():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout())
    torch.manual_seed(3)
    assert forward_flops(model, 2, 4) == 2 * 2 * 4 * 8
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert model[0].weight.grad is None


def test_the_peak_is_that_of_the_longest_matching_name():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA H20") == 148e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("") is None


def test_utilisation():
    # A forward pass is 1 TFLOP a clip, so a step is 3. Two devices take 100 clips a second.
    assert utilisation(1e12, 100, 2, CPU) == {"tflops": 150}


def test_memory_of_this_process():
    before = memory_gib(CPU)
    held = torch.ones(2**28)  # 1 GiB
    assert memory_gib(CPU) > max(before, 1.0)
    assert held.sum() > 0
