"""Old names for research code. Each program runs in a new process, since the names stay for a process."""

import subprocess
import sys

import pytest

IMPORTS = """
from timm.optim.nadam import Nadam
from timm.optim.novograd import NovoGrad
from timm.optim.radam import RAdam
from timm.optim.optim_factory import add_weight_decay
from numpy.lib.function_base import disp
from torch._six import inf
import numpy as np
import timm
import torch
from timm.models.vision_transformer import Block
assert inf == float("inf") and np.float is float
weight = torch.nn.Parameter(torch.ones(2, 2))
for kind in (Nadam, NovoGrad, RAdam):
    optimizer = kind([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
assert (weight < 1).all()
assert len(add_weight_decay(torch.nn.Linear(2, 2), 0.05)) == 2
Block(8, 2, qkv_bias=True, qk_scale=None)
assert isinstance(timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0], Block)
"""

MODEL = """
import torch
from timm.models import create_model
from timm.models.registry import register_model

class Old(torch.nn.Module):
    def __init__(self, width=2, drop_rate=0.0):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

@register_model
def of_old_timm(pretrained=False, **kwargs):
    return Old(**kwargs)

assert create_model("of_old_timm", pretrained=False, width=3).layer.weight.shape == (3, 3)
"""

CHECKPOINT = """
import argparse, io
import numpy as np
import torch
file = io.BytesIO()
torch.save({"args": argparse.Namespace(lr=1e-3), "optimizer": {"lr": np.float64(0.5), "epoch": np.int64(3)}}, file)
file.seek(0)
assert torch.load(file, map_location="cpu")["optimizer"]["lr"] == 0.5
"""


@pytest.mark.parametrize("program", [IMPORTS, MODEL, CHECKPOINT], ids=["imports", "model", "checkpoint"])
def test_old_code_runs(program):
    install = "from adamae_sampler.integrations import old_timm\nold_timm.install()\nold_timm.install()\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", install + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
