"""Imports between the files of benchmarks/ go one way, and no file is long."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each folder imports only those before it.
FOLDERS = ["core", "ops", "steps", "suites", "stages", "masking", "pages"]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


def imports(path):
    """The files of benchmarks/ that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        for name in names:
            found = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("benchmarks.") and found.is_file():
                yield found


def level(path):
    """The place of the file's folder in FOLDERS; commands, at the top, come last."""
    folder = path.relative_to(ROOT / "benchmarks").parts[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_later_folder_or_a_command(path):
    for imported in imports(path):
        assert level(imported) <= level(path), f"{path.name} imports {imported.name}"
        assert level(imported) < len(FOLDERS), f"{path.name} imports the command {imported.name}"
    assert len(path.read_text().splitlines()) <= 400


def test_no_files_import_each_other_in_a_circle():
    left = {path: set(imports(path)) for path in FILES}
    while free := [path for path, needed in left.items() if not needed & left.keys()]:
        for path in free:
            del left[path]
    assert left == {}


def test_every_folder_has_a_level():
    found = {path.relative_to(ROOT / "benchmarks").parts[0] for path in FILES if path.parent != ROOT / "benchmarks"}
    assert found == set(FOLDERS)


def test_the_gpu_command_needs_the_standard_library_alone():
    """A machine without torch then gets a clear first line instead of a traceback."""
    for path in (ROOT / "benchmarks" / "gpu.py", *imports(ROOT / "benchmarks" / "gpu.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in {*sys.stdlib_module_names, "benchmarks"}, f"{path.name}: {name}"


def test_the_gpu_command_starts_from_a_bare_checkout(tmp_path):
    """The command runs by its path, from any folder, without packages (-S: no site-packages; -E: no PYTHONPATH)."""
    call = [sys.executable, "-S", "-E", str(ROOT / "benchmarks" / "gpu.py"), "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout
