"""Names that research code of 2021 to 2023 imports, and that today's timm, NumPy and torch no longer have.

    from adamae_sampler.integrations import old_timm

    old_timm.install()  # at the top of the script that you run

Nothing on disk changes. Code that looks whether an old name exists will find it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import timm.models.registry
import timm.models.vision_transformer
import timm.optim
import torch
from torch import nn

# What create_model passes to every function that builds a model, None if not given; old functions pass all of it on.
_NEW_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def install() -> None:
    """Puts the old names in place, for this process. Calling it again changes nothing.

    - timm: `optim.nadam.Nadam`, `optim.radam.RAdam`, `optim.novograd.NovoGrad`, `optim.optim_factory.add_weight_decay`;
      `models.registry.register_model` for functions that do not know what `create_model` passes today; `Block` takes
      `qk_scale=None`.
    - NumPy: `np.float`, `numpy.lib.function_base.disp`.
    - torch: `torch._six.inf`; `torch.load` reads the arguments and NumPy numbers that the scripts save beside weights.
    """
    _name("timm.optim.nadam", Nadam=torch.optim.NAdam)
    _name("timm.optim.radam", RAdam=torch.optim.RAdam)
    _name("timm.optim.novograd", NovoGrad=importlib.import_module("timm.optim.nvnovograd").NvNovoGrad)
    _name("timm.optim.optim_factory", add_weight_decay=timm.optim.param_groups_weight_decay)
    _name("numpy.lib.function_base", disp=print)
    _name("numpy", float=float)
    _name("torch._six", inf=float("inf"))
    registry: Any = timm.models.registry
    if not hasattr(registry.register_model, "of_old"):
        registry.register_model = _register_model
    _allow_qk_scale(timm.models.vision_transformer.Block)
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np.dtype,
            *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
            importlib.import_module(
                "numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray"
            ).scalar,
        ]
    )


def _name(module: str, **values: Any) -> None:
    """Gives a module attributes that it lacks; makes the module if there is none."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        found = sys.modules[module] = types.ModuleType(module)
        parent, _, name = module.rpartition(".")
        setattr(sys.modules[parent], name, found)
    for name, value in values.items():
        if name not in vars(found):
            setattr(found, name, value)


def _register_model(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's register_model, for functions that pass all their arguments on to a class."""

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> nn.Module:
        unused = [name for name in _NEW_ARGUMENTS if name in kwargs and kwargs[name] is None]
        return function(*args, **{name: value for name, value in kwargs.items() if name not in unused})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registered: Callable[..., nn.Module] = timm.models.register_model(build)
    for each in caught:  # that a name was taken already; the line is that of the research code
        warnings.warn(each.message, each.category, stacklevel=2)
    return registered


_register_model.of_old = True  # type: ignore[attr-defined]


def _allow_qk_scale(block: Any) -> None:
    """Lets timm's block take `qk_scale=None`. The class stays the same, since code asks for it by isinstance."""
    build = block.__init__
    if hasattr(build, "of_old"):
        return

    @functools.wraps(build)
    def init(self: nn.Module, *args: Any, qk_scale: float | None = None, **kwargs: Any) -> None:
        if qk_scale is not None:
            raise TypeError(f"qk_scale={qk_scale}, expected None: today's timm always scales by the heads' width.")
        build(self, *args, **kwargs)

    init.of_old = True  # type: ignore[attr-defined]
    block.__init__ = init
