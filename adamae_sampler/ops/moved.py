"""The new names of the ops' modules. Each module once had the name of its function, which hid the module."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

MOVED = {
    "add_norm": "norm",
    "assemble_tokens": "assemble",
    "draw_mask": "draw",
    "gather_tokens": "gather",
    "head_error": "head",
    "patch_tokens": "pixel_rows",
    "reconstruction_error": "pixel_error",
    "sampling_loss": "sampling",
    "thumbnails": "thumbnail",
    "token_scores": "score",
}


class _Moved(MetaPathFinder):
    """Python asks the last finder only for modules that no other finder has."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Finds nothing; raises ModuleNotFoundError with the new name of a module that has moved."""
        package, _, name = fullname.rpartition(".")
        if package == "adamae_sampler.ops" and name in MOVED:
            raise ModuleNotFoundError(
                f"the module {fullname} is now {package}.{MOVED[name]}. The function is where it was: "
                f"from {package} import {name}.",
                name=fullname,
            )


def name_new_modules() -> None:
    """From now on, the import of an old module fails with the name of the new one."""
    sys.meta_path.append(_Moved())
