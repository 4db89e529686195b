"""The table at the end of benchmarks/gpu.py, and the page of a GPU, made of rows."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.core.rows import (
    COPY,
    OFFICIAL,
    OURS,
    Facts,
    Row,
    RowWriter,
    make_row,
    of_copy,
    of_official,
    read_rows,
    write_rows,
)
from benchmarks.core.timing import Times
from benchmarks.pages import gpu as gpu_tables
from benchmarks.stages import gpu_run
from benchmarks.stages.gpu_run import read_run
from benchmarks.stages.machine import Machine
from benchmarks.stages.outcomes import Outcome
from benchmarks.stages.step_profile import Share
from benchmarks.steps.options import FAST, option_groups
from benchmarks.steps.step import StepCase
from benchmarks.suites import gpu as gpu_cases

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
    folder = tmp_path / "rows"
    write_run(folder)
    report.main([folder])
    text = (folder / "h100.md").read_text()
    assert text.startswith(f"# {H100}\n\nOps and training steps on one {H100}, driver 580, torch 2.11.0, triton 3.6.0")
    assert "2026-12-01" in text
    assert f"| {STEP.name} |" in text
    assert "waits for the device in a step: 0 (none)" in text
    (folder / "versions.json").write_text('{"size": "quick"}')
    with pytest.raises(ValueError, match=r"rows has rows of gpu\.py --quick: its sizes are tiny"):
        report.main([folder])
    (folder / "versions.json").write_text('{"size": "full"}')
    report.main([folder])
    assert (folder / "h100.md").read_text() == text
    write_run(folder, failed=["tests/ops/test_kernels.py::test_sampling_loss"])
    with pytest.raises(ValueError, match=r"tests failed, so its times are not published: .*test_sampling_loss"):
        report.main([folder])


def test_options_are_compared_by_graph_replay_where_both_steps_have_it(tmp_path):
    groups = option_groups(gpu_cases.option_step(quick=False))
    random, exact, pooled = (groups["random masking"][name] for name in ("random", "exact", "pooled"))
    rows = [row_of(case, 0.055, "events", suite="options", peak=9_000_000_000) for case in (random, exact, pooled)]
    rows += [row_of(random, 0.04, "graph", suite="options"), row_of(exact, 0.06, "graph", suite="options")]
    run = dataclasses.replace(write_run(tmp_path), rows=tuple(rows))
    lines = [line for line in gpu_tables.options_table(run).splitlines() if line.startswith("| random masking |")]
    assert [[cell.strip() for cell in line.split("|")[2:6]] for line in lines] == [
        ["random", "40 ms", "1.00", "55 ms"],
        ["exact", "60 ms", "1.50", "55 ms"],
        ["pooled", "55 ms", "1.00", "55 ms"],
    ]


def test_the_summary_is_of_three_steps(tmp_path):
    write_run(tmp_path, exact=0.3)
    assert not (tmp_path / "summary.md").exists()
    assert report.summary_page(tmp_path, report.gpu_runs(tmp_path)) == ""  # the other two were not measured
    steps = {"random": dataclasses.replace(STEP, masking="random"), "fast": dataclasses.replace(STEP, **FAST)}
    path = tmp_path / "steps_nvidia_h100_80gb_hbm3.csv"
    rows = [row_of(STEP, 0.3, "graph", peak=42_000_000_000)]
    rows += [row_of(step, 0.2, "graph", peak=31_000_000_000) for step in steps.values()]
    write_rows(path, Row, rows)
    text = report.summary_page(tmp_path, report.gpu_runs(tmp_path))
    assert "| method | H100, 256 clips (ms) | of random | peak (GB) |" in text
    assert "| exact | 300 | 1.50 | 42.0 |" in text


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
    found = gpu_run.not_measured(run, CUDA, quick=False)
    assert found[0].startswith("steps: ")
    assert found[-2:] == ["kernel-tests (time)", "ncu (failed)"]
    assert "profile: 2 of 3" in found
    (tmp_path / "stages.csv").write_text("stage,status,seconds\nkernel-tests,failed,9\n")  # could not be collected
    with pytest.raises(ValueError, match=r"times are not published: kernel-tests\."):
        gpu_tables.gpu_page(read_run(tmp_path, "nvidia_h100_80gb_hbm3"))


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
