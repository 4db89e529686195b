"""What the rows of benchmarks/gpu.py are made into: the table at its end, and the README's section."""

import dataclasses
from pathlib import Path

import gpu_cases
import gpu_rows
import gpu_tables
import pytest
import report
import torch
from gpu_rows import read_run
from rows import COPY, OFFICIAL, OURS, Facts, Row, RowWriter, make_row, of_copy, of_official, read_rows
from stages.machine import Machine
from stages.outcomes import Outcome
from stages.step_profile import Share
from steps import StepCase
from timing import Times

ROOT = Path(__file__).parents[2]
CUDA, H100 = torch.device("cuda"), "NVIDIA H100 80GB HBM3"
FACTS = Facts(H100, 1, "2.11.0+cu130", "3.6.0", "abc")
STEP = StepCase()
MIDDLE = dataclasses.replace(STEP, clips=64)


def row_of(case, seconds, timing, implementation=OURS, suite="steps", peak=None):
    return make_row(case.subject(suite), implementation, Times(timing, (seconds,) * 3), FACTS, peak_bytes=peak)


def write_run(folder, slug="nvidia_h100_80gb_hbm3", exact=0.30, failed=()):
    """A folder as gpu.py leaves it, with invented figures."""
    op = next(unit.case for unit in gpu_cases.units("ops", CUDA, quick=False) if unit.case.op == "gather_tokens")
    rows = {
        "steps": [
            row_of(STEP, exact, "events", peak=50_000_000_000),
            row_of(STEP, exact, "graph"),
            row_of(MIDDLE, 0.06, "events"),
            row_of(MIDDLE, 0.05, "graph"),
            row_of(MIDDLE, 0.15, "events", OFFICIAL),
        ],
        "ops": [row_of(op, 2e-4, "graph", COPY, "ops"), row_of(op, 4e-4, "graph", suite="ops")],
    }
    machine = Machine(
        H100, "9.0", 80, 132, 3e12, 7.9e14, "580", "13.0", "91900", "2.11.0", "3.6.0", *"1234", "2026-12-01"
    )
    families = {"matrix products": 0.08, "attention": 0.08, "LayerNorm": 0.06, "casts and copies": 0.08}
    shares = [
        Share(STEP.name, 256, "family", name, 1, each, each / exact, H100, "2", "abc")
        for name, each in families.items()
    ]
    shares += [Share(STEP.name, 256, "attention", "flash", 60, 0.08, 0.27, H100, "2", "abc")]
    shares += [Share(STEP.name, 256, "waits", "none", 0, None, None, H100, "2", "abc")]
    tests = [Outcome(f"tests/ops/test_kernels.py::{name}", "passed", 0.1, "", "2") for name in "abc"]
    tests += [Outcome(name, "failed", 0.1, "differs", "2") for name in failed]
    for name, kind, found in (("machine", Machine, [machine]), ("profile", Share, shares), ("tests", Outcome, tests)):
        with RowWriter(folder / f"{name}_{slug}.csv", kind, found):
            pass
    for suite, found in rows.items():
        with RowWriter(folder / f"{suite}_{slug}.csv", Row, found):
            pass
    return read_run(folder, slug)


def cells_of(text, name):
    (header,) = {line for line in text.splitlines() if line.startswith("|  |")}
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return dict(zip(*([cell.strip() for cell in each.split("|")[1:-1]] for each in (header, line)), strict=True))


def test_the_table_holds_predictions_against_what_was_measured(tmp_path):
    text = gpu_tables.summary(write_run(tmp_path, exact=0.24))
    exact = cells_of(text, STEP.name)
    assert exact["predicted"] == "185 ms to 205 ms"
    assert exact["floor"] == "83 ms"
    assert exact["measured"] == exact["as its caller sees it"] == "240 ms"
    assert exact["clips/s"] == "1,067"
    middle = cells_of(text, MIDDLE.name)
    assert (middle["of official"], middle["measured"], middle["predicted"]) == ("0.40", "50 ms", "")
    gather = cells_of(text, next(line.split("|")[1].strip() for line in text.splitlines() if "gather" in line))
    assert (gather["floor"], gather["of a copy's pace"]) == ("200 µs", "50%")
    assert "Tests: 3 passed, 0 failed, 0 skipped." in text
    assert "a copy moves 3 TB/s, a large product makes 790 TFLOP/s" in text
    assert "**" not in text  # nothing was missed


def test_a_prediction_missed_by_more_than_a_third_is_explained_by_the_profile(tmp_path):
    for exact, missed in ((0.274, True), (0.272, False), (0.123, True), (0.124, False)):
        assert (f"**{STEP.name}, graph**" in gpu_tables.summary(write_run(tmp_path, exact=exact))) == missed, exact
    text = gpu_tables.summary(write_run(tmp_path, exact=0.4))
    line = next(line for line in text.splitlines() if line.startswith(f"**{STEP.name}, graph**"))
    assert "400 ms, predicted 185 ms to 205 ms" in line
    assert "elementwise and LayerNorm 140 ms (predicted 31 ms)" in line
    assert "attention 80 ms (predicted 57 ms to 78 ms)" in line
    assert line.endswith("attention by flash.")


def test_the_report_takes_the_rows_of_any_folder(tmp_path):
    readme, folder = tmp_path / "README.md", tmp_path / "rows"
    markers = "\n".join(report.GPU)
    readme.write_text(f"before\n{markers}\nafter\n")
    write_run(folder)
    report.main(report.Options(readme, (folder,)))
    text = readme.read_text()
    assert text.count(f"### {H100}") == 1
    assert "driver 580, torch 2.11.0, triton 3.6.0" in text
    assert "2026-12-01" in text
    assert f"| {STEP.name} |" in text
    assert "waits for the device in a step: 0 (none)" in text
    assert (folder / "steps_nvidia_h100_80gb_hbm3.png").exists()
    (folder / "versions.json").write_text('{"size": "quick"}')
    with pytest.raises(ValueError, match=r"rows has rows of gpu\.py --quick: its sizes are tiny"):
        report.main(report.Options(readme, (folder,)))
    (folder / "versions.json").write_text('{"size": "full"}')
    report.main(report.Options(readme, (folder,)))
    assert readme.read_text() == text
    with pytest.raises(ValueError, match="nowhere has no rows"):
        report.main(report.Options(readme, (folder, tmp_path / "nowhere")))
    write_run(folder, failed=["tests/ops/test_kernels.py::test_sampling_loss"])
    with pytest.raises(ValueError, match=r"tests failed, so its times are not published: .*test_sampling_loss"):
        report.main(report.Options(readme, (folder,)))


def test_without_rows_of_a_gpu_the_report_says_so():
    assert report.gpu_section([]) == report.NO_GPU_ROWS
    assert report.NO_GPU_ROWS in (ROOT / "README.md").read_text() or list(
        (ROOT / "benchmarks/results").glob("machine_*")
    )


def test_ratios_are_of_the_same_way_of_timing():
    ours, graph, official = (
        row_of(MIDDLE, *each) for each in ((0.06, "events"), (0.05, "graph"), (0.15, "events", OFFICIAL))
    )
    case = [ours, graph, official]
    assert of_official(ours, case) == pytest.approx(0.4)
    assert of_official(graph, case) is None
    assert of_copy(ours, case) is None


def test_rows_that_were_cut_short_are_left_out_and_the_others_kept(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [row_of(MIDDLE, 0.06, "events"), row_of(MIDDLE, 0.05, "graph")]
    with RowWriter(path, Row, rows[:1]) as writer:
        writer.add(rows[1])
    whole = path.read_text()
    path.write_text(whole[:-5])  # as a machine that went away leaves it
    assert [row.timing for row in read_rows(path, Row)] == ["events"]
    with RowWriter(path, Row, read_rows(path, Row)) as writer:
        writer.add(rows[1])
    assert path.read_text() == whole


def test_stages_that_have_not_ended_well_are_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "stages.csv").write_text(
        "stage,status,seconds\nkernel-tests,time,9\ngpu-tests,done,9\nncu,failed,1\nsteps,done,9\n"
    )
    run = read_run(tmp_path, "nvidia_h100_80gb_hbm3")
    assert gpu_tables.tests_line(run).endswith("0 skipped. Not all have run: kernel-tests.")
    found = gpu_rows.not_measured(run, CUDA, quick=False)
    assert found[0].startswith("steps: ")
    assert found[-2:] == ["kernel-tests (time)", "ncu (failed)"]
    assert "profile: 2 of 3" in found
    (tmp_path / "stages.csv").write_text("stage,status,seconds\nkernel-tests,failed,9\n")  # could not be collected
    with pytest.raises(ValueError, match=r"times are not published: kernel-tests\."):
        report.gpu_section([read_run(tmp_path, "nvidia_h100_80gb_hbm3")])


def test_the_sweep_is_of_ours_alone(tmp_path):
    run = write_run(tmp_path)
    products = row_of(STEP, 0.083, "graph", "matrix products alone")
    small = row_of(dataclasses.replace(MIDDLE, size="small"), 0.01, "graph", suite="sweep")
    text = gpu_tables.sweep_table(dataclasses.replace(run, rows=(*run.rows, products, small)))
    lines = [line for line in text.splitlines() if line.startswith("| ViT")]
    assert [line.split("|")[1:3] for line in lines] == [
        [" ViT-B, 64 x 1568 ", " 50 ms "],
        [" ViT-B, 256 x 1568 ", " 300 ms "],
        [" ViT-S, 64 x 1568 ", " 10 ms "],
    ]
