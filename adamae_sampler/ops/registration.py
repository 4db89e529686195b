"""How an op's kernels become torch operators, which FakeTensor, `torch.compile` and CUDA graphs know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_LIBRARY = torch.library.Library("adamae_sampler", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers the function below it as torch.ops.adamae_sampler.<name>, and gives that in its place.

    The operator has no gradient of its own: an `autograd.Function` around it has. Both together cost a third of the
    host time of `torch.library.custom_op` with a registered gradient (pytorch/pytorch#176592).

    Args:
        schema: "name(Tensor x, int n) -> Tensor".
        fake: from the same arguments to empty outputs of the right shapes, dtypes and strides.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"adamae_sampler::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.adamae_sampler, name).default

    return register
