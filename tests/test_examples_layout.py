"""The folders of examples/ import one another in one direction, and no files import one another in a circle."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# What each folder may import besides itself; the scripts lie in examples/ itself.
ORDER = {
    "common": set(),
    "video_data": {"common"},
    "training": {"common", "video_data"},
    "evaluation": {"common", "video_data"},
    "pipelines": {"common", "video_data", "training", "evaluation"},
    "scripts": {"common", "video_data", "training", "evaluation", "pipelines"},
}


def files():
    return {
        ".".join(path.relative_to(EXAMPLES).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(EXAMPLES.rglob("*.py"))
    }


def imported(path):
    """Every module or name that a file imports, as a dotted name, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name, modules):
    """The file that holds a dotted name; None for a name from elsewhere."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def folder_of(module):
    return module.partition(".")[0] if "." in module or module in ORDER else "scripts"


def arrows():
    """For each file of the examples the files of the examples that it imports."""
    modules = files()
    return {
        module: {found for name in imported(path) if (found := module_of(name, modules))} - {module}
        for module, path in modules.items()
    }


def test_every_folder_is_in_the_order():
    assert {folder_of(module) for module in files()} == ORDER.keys()


def test_folders_import_downwards():
    for module, others in arrows().items():
        own = folder_of(module)
        for other in others:
            folder = folder_of(other)
            allowed = folder in ORDER[own] or (folder == own and own != "scripts")
            assert allowed, f"{module} ({own}) imports {other} ({folder})"


def test_no_files_import_one_another_in_a_circle():
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the files


def test_the_package_imports_nothing_of_the_examples():
    modules = files()
    for path in (ROOT / "adamae_sampler").rglob("*.py"):
        assert not [name for name in imported(path) if module_of(name, modules)], path


@pytest.mark.parametrize("folder", sorted(ORDER.keys() - {"scripts"}))
def test_a_folder_is_the_package_that_is_imported(folder):
    """No installed package and no folder of the tests hides it."""
    assert Path(importlib.import_module(folder).__file__) == EXAMPLES / folder / "__init__.py"


def test_files_stay_short():
    assert {path.name for path in files().values() if len(path.read_text(encoding="utf-8").splitlines()) > 400} == set()
