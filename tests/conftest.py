import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import NamedTuple

import interpreter_compatibility
import pytest
import safetensors
import torch
from hypothesis import settings
from torch import Tensor

# The models are tiny and tests run side by side: more threads or compile workers would only wait for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # child processes inherit them

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where kernels are defined, so before the import below

from adamae_sampler.models import AdaMAE

if "TRITON_INTERPRET" in os.environ:
    interpreter_compatibility.mend()

torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # fp32 tests compare with convolutions that do not round to TF32

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs signals, shells or processes of POSIX")

# Processes that tests fork from a server skip the seconds of these imports. The modules of the examples are not among
# them: what they set up for a process would be shared by all.
multiprocessing.set_forkserver_preload(
    ["adamae_sampler.models", "accelerate", "torchvision", "torch.utils.tensorboard", "matplotlib.pyplot", "tyro", "av"]
)

DATA = Path(__file__).parent / "data"

# Timings on a shared machine vary; a slow example is not a failure.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter) -> None:
    if terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.write_line('Tests marked slow were left out: add -m slow to run them, -m "" to run all.')


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals() -> None:
    """Restores SIGUSR1. A script run in this process leaves it ignored, and child processes would inherit that."""
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


class Golden(NamedTuple):
    config: dict
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Weights, inputs, outputs and gradients of the official code; see data/README.md."""
    with safetensors.safe_open(DATA / "official_adamae_tiny.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return Golden(config, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def tiny_model(**kwargs) -> AdaMAE:
    """A model of 4x4x4 tokens that runs in milliseconds."""
    sizes = {
        "img_size": 32,
        "num_frames": 8,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "mask_ratio": 0.75,
    }
    return AdaMAE(**{**sizes, **kwargs})


@pytest.fixture
def poisoned_memory():
    """Fills uninitialised memory with NaN or extreme values, so that a place that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
