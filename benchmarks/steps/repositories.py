"""Research code imported from checkouts, none of which is copied here."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from adamae_sampler.integrations import old_timm


@functools.cache  # one class of each name, however often it is asked for
def import_from(path: Path, module: str) -> Any:
    """A module of the checkout in a folder, which was written for older timm and NumPy.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: the code cannot be imported.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no checkout in {path}.")
    old_timm.install()
    own = {each.stem for each in path.iterdir() if each.suffix == ".py" or any(each.glob("*.py"))}
    others = {}  # modules of another checkout, under the same names
    for name, found in list(sys.modules.items()):
        file = getattr(found, "__file__", None)
        if name.partition(".")[0] in own and file and path not in Path(file).parents:
            others[name] = sys.modules.pop(name)
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(path))
        sys.modules.update(others)
