"""The page that says what to expect of a run, against short runs."""

import math
import re

import pretrain
import pytest
from scripts import EXAMPLES, metrics, run_here

from training.run_log import RunLog

PAGE = (EXAMPLES / "docs" / "healthy.md").read_text(encoding="utf-8")
EXPECTED = {
    int(step): {
        True: (float(normalised), float(entropy)),
        False: (float(raw), float(entropy_of_raw)),
    }
    for step, normalised, entropy, raw, entropy_of_raw in re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("normalised", [True, False])
def test_a_hundred_steps_are_as_the_page_says(normalised, tmp_path, monkeypatch):
    assert list(EXPECTED) == [1, 50, 100, 200, 400, 800]
    target = ["--normalize-target" if normalised else "--no-normalize-target", "--picture-every", 0, "--workers", 0]
    run_here(pretrain.main, *target, "--steps", 1, "--output", tmp_path / "one")
    (first,) = metrics(tmp_path / "one")
    assert math.log(144) - 0.2 < first["entropy"] < math.log(144)
    assert 1 <= first["sampling"] / first["reconstruction"] / math.log(144) < 1.05
    assert (1.3 < first["reconstruction"] < 1.5) if normalised else (first["reconstruction"] < 1)

    write = RunLog.write

    def write_and_stop(log, step, values):  # the demo's own schedule, of which these are the first steps
        write(log, step, values)
        if step == 100:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "write", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_here(pretrain.main, *target, "--output", tmp_path / "many")
    assert [line["coverage"] for line in metrics(tmp_path / "many")] == [1, 1]
    for line in [first, *metrics(tmp_path / "many")]:
        reconstruction, entropy = EXPECTED[line["step"]][normalised]
        assert line["reconstruction"] == pytest.approx(reconstruction, rel=0.1)
        assert line["entropy"] == pytest.approx(entropy, abs=0.05)
