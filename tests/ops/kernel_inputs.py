"""Helpers of the kernel tests: their device, inputs, tolerances, and the comparison with the reference."""

import torch

from adamae_sampler import MaskSample, ops

# The tests run on a GPU if there is one, otherwise on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.adamae_sampler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tolerances for sums; copies are compared bit for bit. The interpreter truncates fp32 to bf16 instead of rounding.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
}


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers: sums of a few are exact in every dtype, so results can be compared bit for bit."""
    return torch.randint(-8, 9, shape).to(DEVICE, dtype)


def make_sample(batch: int, tokens: int, visible: int) -> MaskSample:
    with ops.use_backend("torch"):
        return ops.draw_mask(torch.zeros(batch, tokens, device=DEVICE), visible)


def run(backend, call, leaves, upstream):
    """[output, gradient of each leaf] of a call that returns one tensor, on a backend."""
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    with ops.use_backend(backend):
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.device))]


def run_both(call, *leaves, upstream=None):
    """[reference, kernel] of a call that returns one tensor, each as [output, gradient of each leaf]."""
    if upstream is None:
        with ops.use_backend("torch"), torch.no_grad():
            out = call(*leaves)
        upstream = whole_numbers(*out.shape, dtype=out.dtype)
    return [run(backend, call, leaves, upstream) for backend in ("torch", "triton")]


def assert_same(reference, kernel):
    """Bit for bit, dtype and shape included."""
    for expected, got in zip(reference, kernel, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_close(reference, kernel, dtype=torch.float32):
    for expected, got in zip(reference, kernel, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, **TOLERANCE[dtype])
