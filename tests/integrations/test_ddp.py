"""DDP in two CPU processes (gloo): every parameter of the sampler gets its gradient without find_unused_parameters."""

import contextlib

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_model
from forked import START_METHOD, free_port
from hosts import make_mae, structured
from torch.nn.parallel import DistributedDataParallel

from adamae_sampler import AdaMAELoss, patch

SETTINGS = [(1e-4, 1, False), (0.0, 1, False), (1e-4, 2, False), (1e-4, 1, True)]


def train(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results[rank] = [train_with(rank, *settings) for settings in SETTINGS]
    dist.destroy_process_group()


def train_with(rank, weight, accumulate, checkpointing):
    """(masks drawn, weights after three steps)."""
    torch.manual_seed(0)
    model = tiny_model()
    model.set_grad_checkpointing(checkpointing)
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    criterion = AdaMAELoss(weight, patch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(10 + rank)
    masks = []
    for _ in range(3):
        for part in range(accumulate):
            video = torch.rand(2, 3, 8, 32, 32)
            with contextlib.nullcontext() if part == accumulate - 1 else parallel.no_sync():
                prediction, sample = parallel(video)
                criterion(prediction, video, sample).loss.backward()
            masks.append(sample.mask)
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(masks), torch.cat([each.detach().flatten() for each in model.parameters()])


def test_two_processes_agree_on_weights_and_draw_different_masks():
    """For several weights of the sampling loss, accumulation and activation checkpointing, in one start of processes."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(train, (free_port(), results), nprocs=2, start_method=START_METHOD)
        one, two = results[0], results[1]
    for settings, (masks_0, weights_0), (masks_1, weights_1) in zip(SETTINGS, one, two, strict=True):
        assert torch.equal(weights_0, weights_1), settings
        assert not torch.equal(masks_0, masks_1), settings


def train_patched(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = patch(make_mae().train())
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    torch.manual_seed(10 + rank)
    parallel(structured(2, (3, 32, 32), rank))[0].backward()
    gradient = torch.cat([each.grad.flatten() for each in model.sampler.parameters()])
    results[rank] = (model.last_step.sample.mask, gradient)
    dist.destroy_process_group()


def test_a_patched_host_in_two_processes():
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(train_patched, (free_port(), results), nprocs=2, start_method=START_METHOD)
        (mask_0, gradient_0), (mask_1, gradient_1) = results[0], results[1]
    assert not torch.equal(mask_0, mask_1)
    assert torch.equal(gradient_0, gradient_1)
    assert gradient_0.any()
