"""Lets the interpreter of Triton 3.6 and older count loops under NumPy 2.4 and newer.

That NumPy refuses `int(array)` for an array with one axis, which is how the interpreter reads a loop's bound. Newer
Tritons squeeze the array first.
"""

from typing import Any


def mend() -> None:
    """Replaces the interpreter's `tensor.__index__`, whichever Triton is installed; nothing without Triton."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
