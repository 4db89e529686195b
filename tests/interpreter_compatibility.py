"""Repairs of Triton's interpreter: loops under NumPy 2.4 for Triton 3.6 and older, boolean negation for Triton 3.2.

The interpreter reads a loop's bound as `int(array)`. NumPy 2.4 and newer refuse this for an array with one axis. Newer
Tritons squeeze the array first. The interpreter of Triton 3.2 lacks the type int1 and its value of all ones.
"""

from typing import Any

import numpy as np


def mend() -> None:
    """Replaces the interpreter's `tensor.__index__` and adds int1 where it is missing. Without Triton, does nothing."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "get_int1_ty"):
        all_ones = builder.get_all_ones_value

        def all_ones_or_true(self: Any, kind: Any) -> Any:
            if kind.scalar != tl.int1:
                return all_ones(self, kind)
            return interpreter.TensorHandle(np.full(1, True), kind.scalar)

        builder.get_int1_ty = lambda self: tl.int1
        builder.get_all_ones_value = all_ones_or_true
    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
