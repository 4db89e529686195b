"""Registers an op's kernels as torch operators, which work with FakeTensor, `torch.compile` and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("adamae_sampler", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that registers a function as torch.ops.adamae_sampler.<name>, and returns that operator.

    The operator has no gradient; an `autograd.Function` around it has one. Both together cost a third of the host time
    of `torch.library.custom_op` with a registered gradient (pytorch/pytorch#176592).

    Args:
        schema: the operator's name and types, such as "name(Tensor x, int n) -> Tensor".
        fake: a function of the same arguments that returns empty outputs of the right shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"adamae_sampler::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.adamae_sampler, name).default

    return register
