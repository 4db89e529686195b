import doctest
import email
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from adamae_sampler import ops
from adamae_sampler.ops.moved import MOVED

ROOT = Path(__file__).parent.parent


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **kwargs).stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_imports(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"adamae_sampler"}
    assert "adamae_sampler/py.typed" in names
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = f"""
import sys; sys.path.insert(0, {str(unpacked)!r})
import adamae_sampler, timm
assert adamae_sampler.__file__.startswith({str(unpacked)!r})
assert "pretrain_adamae_vit_base_patch16_224" in timm.list_models("pretrain_adamae*")
print(adamae_sampler.__version__)
"""
    assert python(code, cwd=tmp_path).strip() in wheel.name


@pytest.mark.slow
def test_a_release_has_addresses_and_its_source_has_the_results(tmp_path):
    """As the release workflow builds it: the source, then the wheel from it."""
    home = "https://github.com/owner/name"
    release = {"ADAMAE_SAMPLER_REPOSITORY": home, "ADAMAE_SAMPLER_REF": "v1.2.3"}
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **release})
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    results = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py", *results} <= names
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert f"Repository, {home}" in metadata.get_all("Project-URL")
    assert f"Issues, {home}/issues" in metadata.get_all("Project-URL")
    page = metadata.get_payload()
    assert f"({home}/raw/v1.2.3/examples/pictures/sprites_90.gif)" in page
    assert f"({home}/blob/v1.2.3/adamae_sampler/README.md)" in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert {link for link in links if not link.startswith(("https://", "#"))} == set()
    paths = [link.removeprefix(f"{home}/blob/v1.2.3/").partition("#")[0] for link in links if f"{home}/blob" in link]
    assert paths
    assert all((ROOT / each).exists() for each in paths)


@pytest.mark.slow
def test_import_leaves_the_extras_alone():
    code = """
import sys
import adamae_sampler
assert not {"matplotlib", "av", "accelerate", "tensorboard", "tyro", "common", "training", "transformers", "hiera"} & set(sys.modules)
"""
    python(code)


def test_data_flows_one_way():
    """A module imports only from its own layer and the layers before it."""
    layers = [
        ["mask"],
        ["ops", "estimators"],
        ["attention", "transformer", "positions", "networks", "sampler", "losses"],
        ["models", "integrations", "visualize", "env"],
    ]
    level = {name: height for height, names in enumerate(layers) for name in names}
    for path in (ROOT / "adamae_sampler").rglob("*.py"):
        inside = path.relative_to(ROOT / "adamae_sampler")
        own = level.get(inside.parts[0].removesuffix(".py"))
        if own is None:  # the package's __init__
            continue
        for line in path.read_text().splitlines():
            if line.startswith(("from adamae_sampler.", "import adamae_sampler.")):
                imported = line.split()[1].split(".")[1]
                assert level[imported] <= own, f"{inside}: {line}"
            assert not line.startswith("from torch.utils.data")


@pytest.mark.parametrize("path", sorted((ROOT / "adamae_sampler").rglob("*.py")), ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_docstring_examples():
    modules = [f"adamae_sampler.{name}" for name in ("sampler.adaptive", "sampler.hard", "sampler.schedule")]
    modules += ["adamae_sampler.ops.draw", "adamae_sampler.ops.gather"]
    for name in modules:
        found = doctest.testmod(importlib.import_module(name))
        assert (found.failed, found.attempted > 0) == (0, True), name


def test_no_function_hides_a_module():
    modules = {each.name for each in pkgutil.iter_modules(ops.__path__)}
    assert not modules & set(ops.__all__)
    for name in modules:
        assert getattr(ops, name) is importlib.import_module(f"adamae_sampler.ops.{name}")


@pytest.mark.parametrize("name", MOVED)
def test_moved_modules_name_their_new_place(name):
    message = rf"adamae_sampler\.ops\.{name} is now adamae_sampler\.ops\.{MOVED[name]}\."
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(f"adamae_sampler.ops.{name}")
    assert getattr(importlib.import_module(f"adamae_sampler.ops.{MOVED[name]}"), name) is getattr(ops, name)
    assert callable(getattr(ops, name))


def test_the_example_of_the_ops_runs():
    readme = (ROOT / "adamae_sampler" / "ops" / "README.md").read_text()
    start = readme.index("```python") + len("```python")
    space = {}
    exec(readme[start : readme.index("```", start)], space)
    assert space["loss"].isfinite()
    assert all(each.weight.grad is not None for each in (space["score"], space["encoder"], space["head"]))
    files = dict(re.findall(r"^\| `(\w+)` \| \[`(\w+\.py)`\]", readme, re.MULTILINE))
    assert files == {name: f"{MOVED[name]}.py" for name in MOVED}
