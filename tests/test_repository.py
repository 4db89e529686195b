"""The files that GitHub and pre-commit read parse and agree with the project."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from conftest import needs_posix
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import adamae_sampler

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
GITHUB = ROOT / ".github"
YAML_FILES = sorted([*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path):
    # YAML 1.1 reads the key `on` as True; GitHub reads it as a word.
    text = re.sub(r"^on:", '"on":', path.read_text(), flags=re.MULTILINE)
    return yaml.safe_load(text)


def steps(path):
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_file_parses(path):
    assert isinstance(load(path), dict)


def test_workflows_have_triggers_jobs_and_few_permissions():
    for path in (GITHUB / "workflows").glob("*.yml"):
        workflow = load(path)
        assert workflow["on"], path.name
        assert workflow["permissions"] == {"contents": "read"}, path.name
        assert all("uses" in step or "run" in step for step in steps(path)), path.name


def test_ci_runs_what_everybody_runs_on_the_oldest_and_the_newest_python():
    path = GITHUB / "workflows" / "ci.yml"
    assert [step["run"] for step in steps(path) if "run" in step] == ["bash .ci/run"]
    legs = load(path)["jobs"]["run"]["strategy"]["matrix"]["include"]
    assert [leg["python"] for leg in legs] == ["3.10", "3.13"]
    assert [leg["constraints"] for leg in legs] == [".ci/oldest.txt", ""]
    assert f">={legs[0]['python']}" == PROJECT["requires-python"]


def test_every_python_of_a_workflow_is_supported():
    found = re.findall(r'python(?:-version)?: "([\d.]+)"', "".join(each.read_text() for each in YAML_FILES))
    assert len(found) >= 3
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in found)


def test_the_oldest_releases_are_the_lower_bounds():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    oldest = {
        each.name: each.specifier for each in map(Requirement, filter(None, (x.partition("#")[0] for x in lines)))
    }
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (least,), (pinned,) = requirement.specifier, oldest[requirement.name]
        assert (least.operator, pinned.operator) == (">=", "==")
        # The pin is a patch release of the lower bound: 2.6 -> 2.6.0, 0.4 -> 0.4.5.
        assert f"{pinned.version}.".startswith(f"{least.version}."), requirement.name


@pytest.mark.parametrize("constraints", ["", ".ci/oldest.txt"])
@needs_posix
def test_ci_passes_constraints_to_pip(constraints, tmp_path):
    """Runs the line of .ci/run that installs the package, with a pip that prints its arguments."""
    script = (ROOT / ".ci" / "run").read_text()
    (line,) = re.findall(r"^(?:pip )?install .*\[test\](?:.*\\\n)*.*", script, flags=re.MULTILINE)
    recorder = 'pip() { printf "%s\\n" "$@"; }\ninstall() { pip "$@"; }\n'
    environment = {**os.environ, "ADAMAE_SAMPLER_CONSTRAINTS": constraints}
    command = ["bash", "-euc", recorder + line]
    given = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert given[-2:] == (["--constraint", constraints] if constraints else ["-e", ".[test]"])


@needs_posix
def test_ci_tests_the_package_on_the_oldest_releases():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"oldest/bin/pip. install .*--constraint \.ci/oldest\.txt", script)
    (names,) = re.findall(r"oldest/bin/python. -m pytest ((?:.*\\\n)*.*)", script)
    told = subprocess.run(["bash", "-c", f"ls -d {names}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"tests/ops", "tests/models", "tests/test_mask.py", "tests/test_losses.py"} <= set(told.split())


def test_a_release_is_checked_and_published_without_a_token():
    path = GITHUB / "workflows" / "release.yml"
    publish = load(path)["jobs"]["publish"]
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert "secrets." not in path.read_text()


@pytest.mark.parametrize(("tag", "passes"), [("v1.2.3", True), ("1.2.3", False), ("v1.2.4", False)])
@needs_posix
def test_a_release_of_another_version_than_its_tag_is_refused(tag, passes, tmp_path):
    (check,) = [step for step in steps(GITHUB / "workflows" / "release.yml") if "Check" in step.get("name", "")]
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "adamae_sampler-1.2.3-py3-none-any.whl").touch()
    done = subprocess.run(
        ["bash", "-ec", check["run"].replace("python -", f"{shlex.quote(sys.executable)} -")],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "GITHUB_REF_NAME": tag},
    )  # fmt: skip
    assert (done.returncode == 0) == passes
    assert passes or f"the tag is {tag}, expected v1.2.3" in done.stderr


def test_issue_forms_are_what_github_takes():
    for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml"):
        if path.name == "config.yml":
            continue
        form = load(path)
        assert form["name"], path.name
        assert form["description"], path.name
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids), path.name
        for field in form["body"]:
            assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}, path.name
            assert field["attributes"]["label"], path.name


def test_a_bug_report_asks_for_the_environment():
    (field,) = [field for field in load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"] if field["id"] == "environment"]
    assert "`python -m adamae_sampler.env`" in field["attributes"]["description"]
    assert field["validations"]["required"]


def test_the_version_stands_in_two_places_that_agree():
    assert adamae_sampler.__version__ == PROJECT["version"]


def test_the_contribution_guide_is_short_and_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) < 120
    names = set(re.findall(r"`([\w./]+/|[\w./]+\.(?:py|md|toml|txt))`", text))
    assert len(names) > 15
    for name in names:
        assert (ROOT / name).exists() or any(
            list((ROOT / folder).rglob(name)) for folder in ("adamae_sampler", "tests", "benchmarks")
        ), name
