"""The documents: their links, commands and code name things that exist."""

import ast
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
)
WRITTEN = [page for page in PAGES if page.parent.name != "results" and page.name != "CHANGELOG.md"]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors that GitHub makes of the titles: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).replace("`", "") for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def commands(page):
    """Every command line of the page, from its bash blocks and from backticks in its text."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [each for line in shell.splitlines() for each in re.split(r" && |; ", line)]
    lines += re.findall(r"`((?:python|pytest|pip|accelerate|bash|sbatch) [^`]*)`", prose(page))
    lines = [
        re.sub(r"-m (benchmarks)\.(\w+)", r"\1/\2.py", line) for line in lines
    ]  # -m benchmarks.name runs benchmarks/name.py
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{target}: the anchors are {sorted(anchors(there))}"


@cache
def help_of(script, *subcommand):
    """The help text that the script, or one of its subcommands, prints for --help."""
    out = io.StringIO()
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(script), *subcommand, "--help"], [str(script.parent), str(ROOT)]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return out.getvalue()


def options_of(page):
    """(script, its options, all its arguments) for each command of the page that gives a script options."""
    for words in commands(page):
        scripts = [word for word in words if re.fullmatch(r"(examples|benchmarks)/\w+\.py", word)]
        given = words[words.index(scripts[0]) + 1 :] if scripts else []
        if options := [word.partition("=")[0] for word in given if word.startswith("--")]:
            yield scripts[0], options, given


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_can_be_typed(page):
    for words in commands(page):
        for word in words:
            if re.match(r"(examples|benchmarks|tests|\.ci)/[\w./-]+$", word):
                assert (ROOT / word).exists(), f"{' '.join(words)}: no {word}"
    for script, options, given in options_of(page):
        known = set(re.findall(r"--[\w-]+", help_of(ROOT / script, *itertools.takewhile(str.isalnum, given))))
        assert known, f"{script} --help prints no option"
        assert set(options) <= known, f"{script} has no {sorted(set(options) - known)}"
        presets = [value for option, value in itertools.pairwise(given) if option == "--preset"]
        folder = ROOT / "examples" / "presets" / ("finetune" if "finetune" in script else "pretrain")
        assert all(preset in {file.stem for file in folder.iterdir()} for preset in presets), f"{script} {presets}"


def test_every_extra_named_exists():
    known = importlib.metadata.metadata("adamae_sampler").get_all("Provides-Extra")
    named = {each for page in WRITTEN for each in re.findall(r'"\.\[(\w+)\]"', page.read_text(encoding="utf-8"))}
    assert named
    assert named <= set(known)


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_python_blocks_parse_and_import_what_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adamae_sampler"):
                exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= (210 if page == ROOT / "README.md" else 150)


def test_the_readme_has_the_table_of_the_report():
    def table(page):
        return re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)

    (summary,) = table(ROOT / "benchmarks" / "results" / "summary.md")
    assert summary in table(ROOT / "README.md")


def test_the_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[there](other.md#x) `python examples/pretrain.py --nothing`\n```bash\npytest a && pip b\n```\n"
    )
    assert anchors(page) == {"a-b-c"}
    assert commands(page) == [["pytest", "a"], ["pip", "b"], ["python", "examples/pretrain.py", "--nothing"]]
    assert list(options_of(page)) == [("examples/pretrain.py", ["--nothing"], ["--nothing"])]
    with pytest.raises(AssertionError, match=r"other\.md#x leads nowhere"):
        test_every_link_leads_somewhere(page)
    with pytest.raises(AssertionError, match=r"pretrain\.py has no \['--nothing'\]"):
        test_every_command_can_be_typed(page)
