"""The choice of backend: how it is made, which implementation runs, and the errors where it cannot run."""

import os
import re
import subprocess
import sys

import pytest
import torch

from adamae_sampler import ops


def run(code, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**inherited, **environment}, check=False
    )


def test_the_backend_can_be_read_set_and_restored():
    assert ops.get_backend() == "auto"
    with ops.use_backend("torch"):
        assert ops.get_backend() == "torch"
        with pytest.raises(RuntimeError, match="inside"), ops.use_backend("triton"):
            raise RuntimeError("inside")
        assert ops.get_backend() == "torch"
    assert ops.get_backend() == "auto"
    ops.set_backend("torch")
    assert ops.get_backend() == "torch"
    ops.set_backend("auto")
    with pytest.raises(ValueError, match=r"backend='cuda', expected one of 'auto', 'triton', 'torch'"):
        ops.set_backend("cuda")
    with pytest.raises(ValueError, match="backend='gpu'"), ops.use_backend("gpu"):
        pass
    assert ops.get_backend() == "auto"


def test_auto_takes_plain_pytorch_on_cpu():
    assert ops.backend_for(torch.zeros(1)) == "torch"


def test_backend_for_follows_the_choice():
    pytest.importorskip("triton")
    x = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            assert ops.backend_for(x) == backend


@pytest.mark.slow
def test_environment_variable():
    code = "from adamae_sampler import ops; print(ops.get_backend())"
    assert run(code, ADAMAE_SAMPLER_BACKEND="torch").stdout.strip() == "torch"
    assert "ADAMAE_SAMPLER_BACKEND='fast', expected one of" in run(code, ADAMAE_SAMPLER_BACKEND="fast").stderr


CALL = "import torch; from adamae_sampler import ops; ops.draw_mask(torch.zeros(2, 8), 2); print('drawn')"


@pytest.mark.slow
def test_triton_on_a_device_that_cannot_run_it_is_an_error():
    failed = run(CALL, ADAMAE_SAMPLER_BACKEND="triton")
    assert failed.returncode
    assert 'backend "triton" was asked for, but the tensors are on cpu' in failed.stderr
    assert 'Use set_backend("auto")' in failed.stderr


@pytest.mark.slow
def test_everything_works_without_triton_and_asking_for_it_says_so():
    without = "import sys; sys.modules['triton'] = None; "
    assert run(without + CALL).stdout.strip() == "drawn"
    failed = run(without + CALL, ADAMAE_SAMPLER_BACKEND="triton")
    assert "Triton is not installed (pip install triton, on Linux)" in failed.stderr


@pytest.mark.slow
def test_an_interpreter_that_cannot_run_the_kernels_is_an_error():
    pytest.importorskip("triton")
    # As Triton 3.2, which cannot negate a boolean. With NumPy 2.4 its loops fail too, and earlier.
    older = "from triton.runtime.interpreter import InterpreterBuilder as B; vars(B).get('get_int1_ty') and delattr(B, 'get_int1_ty'); "
    failed = run(older + CALL, ADAMAE_SAMPLER_BACKEND="triton", TRITON_INTERPRET="1")
    assert re.search(
        r'"triton" was asked for, but the interpreter of Triton \S+ does not run the kernels with NumPy \S+: '
        r"(AttributeError|TypeError).* Install triton>=3.7, or numpy<2.4 with Triton 3.3 to 3.6",
        failed.stderr,
    )
    assert run(older + CALL, TRITON_INTERPRET="1").stdout.strip() == "drawn"  # "auto" takes plain PyTorch


def test_inputs_that_the_kernels_do_not_take_are_refused_under_triton():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.zeros(1, 8, dtype=torch.float64, device=device)
    video = torch.zeros(1, 1, 2, 128, 128, device=device)
    idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    prediction = torch.zeros(1, 1, 2 * 128 * 128, device=device)
    with ops.use_backend("triton"):
        with pytest.raises(TypeError, match=r"take float32, float16, bfloat16 and uint8, got torch.float64"):
            ops.draw_mask(scores, 2)
        with pytest.raises(ValueError, match=r"draws from up to 2097151 tokens, not 2097152"):
            ops.draw_mask(torch.zeros(1, 2**21, device=device), 2)
        with pytest.raises(ValueError, match=r"patches of up to 8192 pixels, not 2x128x128"):
            ops.reconstruction_error(prediction, video, idx, patch_size=128)
        five, stats = torch.zeros(1, 5, 2, 16, 16, device=device), {"mean": [0.5] * 5, "std": [0.2] * 5}
        with pytest.raises(ValueError, match=r"mean and std of up to 4 channels, not 5"):
            ops.reconstruction_error(torch.zeros(1, 1, 2560, device=device), five, idx, **stats)
    # "auto" takes plain PyTorch for them.
    assert ops.draw_mask(scores, 2).log_probs.dtype == torch.float64
    assert ops.reconstruction_error(prediction, video, idx, patch_size=128).shape == (1, 1)


def test_compiled_code_follows_the_choice():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.zeros(2, 8, device=device)
    graphs = []

    def record(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(lambda x: ops.draw_mask(x, 2).mask, backend=record, fullgraph=True)
    for backend in ("torch", "triton"):
        with ops.use_backend(backend):
            compiled(scores)
    assert ["adamae_sampler.draw_mask" in " ".join(names) for names in graphs] == [False, True]
