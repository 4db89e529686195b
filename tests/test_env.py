"""The environment report for bug reports is complete, aligned and private, and it never fails."""

import getpass
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_posix

from adamae_sampler import env, ops


def report(code="", **environment):
    """The report that a new process prints after running `code`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = f"{code}\nimport runpy; runpy.run_module('adamae_sampler.env', run_name='__main__')"
    command = [sys.executable, "-c", run] if code else [sys.executable, "-m", "adamae_sampler.env"]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, check=True).stdout


def test_the_command_prints_aligned_names_and_values_and_nothing_private():
    printed = report(ADAMAE_SAMPLER_BACKEND="torch")
    lines = printed.splitlines()
    width = max(len(name) for name in env.collect())
    found = {line[:width].rstrip(): line[width + 2 :] for line in lines}
    assert all(line[width : width + 2] == "  " and line[width + 2 :].strip() for line in lines)
    assert list(found) == list(env.collect())
    assert found["Python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["backend in force"] == found["ADAMAE_SAMPLER_BACKEND"] == "torch"
    assert found["attention preference"] == "cuDNN, flash, memory-efficient, math"
    assert str(env.devices()[0]) in found
    for private in (platform.node(), str(Path.home()), sys.prefix, os.getcwd()):
        assert private not in printed or len(private) < 2
    assert getpass.getuser() not in printed.split()
    assert "/" not in printed


def test_without_triton_and_without_a_gpu():
    printed = report("import sys; sys.modules['triton'] = None", CUDA_VISIBLE_DEVICES="", PATH="")
    assert 'backend "auto" on cpu   plain PyTorch, because Triton is not installed' in printed
    assert "NVIDIA driver           no nvidia-smi" in printed


def test_a_package_that_is_not_installed_is_reported():
    assert env.package_version("no-such-package") == "not installed"
    assert env.package_version("timm")[0].isdigit()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 570.1; echo 570.1", "570.1"),
        ("exit 9", "unknown: nvidia-smi ended with code 9"),
        ("exit 0", "unknown: nvidia-smi lists no GPU"),
    ],
)
@needs_posix
def test_the_driver_version_or_why_it_is_unknown(script, said, tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.driver_version() == said


@pytest.mark.parametrize("chosen", ["auto", "torch"])
def test_auto_is_described_whatever_backend_is_set(chosen):
    with ops.use_backend(chosen):
        assert env.describe_auto(torch.device("cpu")).startswith("plain PyTorch, because the tensors are on")
        assert ops.get_backend() == env.collect()["backend in force"] == chosen


def test_a_cuda_device_is_described_by_its_properties(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA X", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert [str(each) for each in env.devices()] == ["cuda:0", "cuda:1"]
    assert env.describe_device(torch.device("cuda", 1)) == "NVIDIA X, compute capability 9.0, 80 GiB"
