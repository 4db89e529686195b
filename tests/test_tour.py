"""The notebook runs from top to bottom, and its outputs show what its text says."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def assert_p_rises_on_both_sprites(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    lines = re.findall(
        r"^(\w+), last ten steps: moving (.*), still sprite (.*), background (.*)$", printed, re.MULTILINE
    )
    found = {name: [float(share) for share in shares] for name, *shares in lines}
    assert found["control"] == [1, 1, 1]
    moving, still, background = found["adaptive"]
    assert min(moving, still) > 1.3
    assert background < 0.9
    assert 0.5 < moving / still < 2  # as the text says: contrast, not motion
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2  # curves; p and mask
    assert any("data:image/gif;base64," in output.get("data", {}).get("text/html", "") for output in outputs)


def test_the_committed_outputs_are_whole_small_and_private():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert_p_rises_on_both_sprites(notebook)
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert not re.search(r"/(?:root|home|Users|tmp)/", NOTEBOOK.read_text())
    assert [cell for cell in code if "from video_data" in cell.source] == code[:1]


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.source = cell.source.replace("STEPS = 100", "STEPS = 50")  # enough for p to turn to the sprites
    assert "STEPS = 50" in "".join(cell.source for cell in notebook.cells)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    assert_p_rises_on_both_sprites(notebook)
