"""The benchmark suite in small: it checks before it times, writes its rows, and makes tables of rows alone."""

import csv
import dataclasses
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import work

from adamae_sampler import ops
from benchmarks import estimator_bias, report, run
from benchmarks.core.rows import Facts, Row, make_row, read_rows, write_rows
from benchmarks.core.timing import Times
from benchmarks.core.worker import Worker
from benchmarks.loader import check as check_readers
from benchmarks.loader import read_pyav
from benchmarks.ops.cases import DrawMask, GatherTokens, ReconstructionError
from benchmarks.pages.cpu import options_page
from benchmarks.steps import options as option_cases
from benchmarks.steps.finetune import FinetuneStep
from benchmarks.suites import cpu, measure
from benchmarks.suites import gpu as gpu_cases
from video_data.video_lists import VideoEntry

ROOT = Path(__file__).parents[2]


def command(name, *arguments):
    """What `python -m benchmarks.NAME` prints."""
    call = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run.main(run.Options(quick=True, output=folder))
    return folder


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_a_worker_is_none_of_the_other_programs():
    per_second = os.sysconf("SC_CLK_TCK")
    with Worker() as worker:
        (number,) = worker.stream(work.compute, 0.3, limit_s=60)
        assert run._ticks(Path(f"/proc/{number}/stat")) >= 0.2 * per_second
    code = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True) as other:
        stat = Path(f"/proc/{other.pid}/stat")
        while sum(map(int, stat.read_text().split()[13:15])) < 0.2 * per_second:
            time.sleep(0.01)
        assert run._ticks(stat) == 0
        other.communicate(b"\n")


@pytest.mark.slow
def test_every_op_and_a_step_are_timed_beside_the_official_code(results):
    rows = [row for path in sorted(results.glob("*.csv")) for row in csv.DictReader(path.open())]
    names = {"draw_mask", "gather_tokens", "assemble_tokens", "reconstruction_error", "sampling_loss"}
    for name in names:
        assert {"adamae_sampler", "official"} <= {row["implementation"] for row in rows if row["op"] == name}
    assert {"adamae_sampler", "official"} <= {row["implementation"] for row in rows if row["direction"] == "step"}
    for row in rows:
        assert float(row["min_s"]) <= float(row["q1_s"]) <= float(row["median_s"]) <= float(row["max_s"])
        assert row["torch"] == torch.__version__
        assert row["commit"]
        if row["op"] in names:
            assert int(row["bytes"]) > 0
            assert float(row["fraction_of_copy"]) > 0


@pytest.mark.slow
def test_pages_are_made_of_rows_alone(results, tmp_path):
    report.main([results])
    text = (results / "cpu.md").read_text()
    assert "draw_mask 2 x 128" in text
    assert f"torch {torch.__version__}, 1 thread, commit " in text.splitlines()[2]
    assert sorted(path.name for path in results.glob("*.md")) == ["cpu.md"]
    with pytest.raises(ValueError, match="has no rows"):
        report.main([tmp_path / "nowhere"])


def test_the_committed_pages_are_those_of_the_committed_rows():
    folder = ROOT / "benchmarks" / "results"
    assert {path.stem: path.read_text() for path in folder.glob("*.md")} == {
        name: f"{text}\n" for name, text in report.pages(folder).items()
    }


def test_every_committed_file_of_rows_is_on_a_page(tmp_path):
    """Without any one of the files some page changes: no file is there for nothing."""
    folder = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    pages = report.pages(folder)
    for path in sorted(folder.glob("*.csv")):
        if path.name.startswith("failures_"):  # empty, which says that nothing failed
            continue
        path.rename(tmp_path / path.name)
        assert report.pages(folder) != pages, path.name
        (tmp_path / path.name).rename(path)


@pytest.mark.parametrize("case", [DrawMask(2, 64, 5), GatherTokens(2, 64, 5, "backward", width=8)])
def test_a_wrong_result_is_found_before_any_time_is_taken(case, monkeypatch):
    device = torch.device("cpu")
    case.check(device)
    right = getattr(ops, case.op)
    if case.op == "draw_mask":
        wrong = lambda *args: right(*args)._replace(log_probs=right(*args).log_probs + 1e-3)  # noqa: E731
    else:
        wrong = lambda *args: right(*args) * 1.0001  # noqa: E731
    monkeypatch.setattr(ops, case.op, wrong)
    with pytest.raises(AssertionError, match=case.op):
        case.check(device)


def test_bytes_are_the_fewest_that_must_move():
    assert DrawMask(256, 1568, 78).bytes == 256 * 1568 * (4 + 8 + 1 + 4) + 256 * 8
    fp16 = ReconstructionError(256, 1568, 78, dtype=torch.float16, video_dtype=torch.uint8)
    assert fp16.bytes == 256 * 1490 * (1536 * 3 + 8 + 4)


def test_the_step_of_fine_tuning_is_a_step():
    """At first the 400 classes are about equally likely."""
    step = FinetuneStep(clips=1, img_size=32, depth=1)
    assert float(step.make(torch.device("cpu"))()) == pytest.approx(math.log(400), abs=0.1)


@pytest.mark.slow
def test_readers_are_timed_after_their_frames_are_compared(tmp_path):
    printed = command(
        "loader", "--videos", "1", "--size", "96", "128", "--seconds", "1", "--rounds", "2", "2", "--no-step",
        "--output", str(tmp_path / "rows.csv"),
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    reads = [row for row in rows if row["what"] == "read and crop"]
    assert {"PyAV"} <= {row["decoder"] for row in reads}
    assert len({row["videos"] for row in reads}) == 3
    assert all(float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"]) for row in rows)
    assert "| files, 128 x 96, key frames every 250 |" in printed
    if importlib.util.find_spec("torchcodec") is None:
        assert "torchcodec is not installed and is left out" in printed


def test_a_reader_with_other_frames_is_found():
    entry = VideoEntry(ROOT / "examples" / "clips" / "bigbuckbunny.mp4")
    check_readers({"a video": [entry]}, {"right": read_pyav})
    with pytest.raises(AssertionError, match=r"a video, late: frames differ by .* of 255"):
        check_readers({"a video": [entry]}, {"late": lambda entry, generator: read_pyav(entry, generator).roll(1, 0)})


def test_the_bias_of_the_estimators(tmp_path, capsys):
    estimator_bias.main(estimator_bias.Options(trials=3, output=tmp_path / "rows.csv"))
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    cosines = {row["estimator"]: float(row["cosine"]) for row in rows}
    assert cosines["plackett_luce"] == pytest.approx(1, abs=1e-3)
    assert cosines["plackett_luce_max"] == pytest.approx(-1, abs=1e-3)
    assert abs(cosines["categorical"]) < 0.95
    assert len(rows) == 9
    assert "| of the token | plackett_luce | 1.00 ± 0.00 |" in capsys.readouterr().out


def test_every_option_is_timed():
    """That each is a step that trains is shown by the rehearsal of gpu.py, which times them all."""
    groups = cpu.option_groups_of(quick=True)
    assert all(len(cases) > 1 for cases in groups.values())
    seen = {name for cases in groups.values() for case in cases.values() for name in case.options}
    assert seen == {"score_network", "sample_from", "num_masks", "decode_ratio", "fused_head"}
    units = {unit.case for unit in gpu_cases.units("options", torch.device("cpu"), quick=True)}
    assert units == {case for cases in groups.values() for case in cases.values()}
    assert [parts[0].size.num_tokens for parts in cpu.part_groups(quick=True)] == [128, 256]


def test_options_are_measured_in_turns_and_a_group_that_fails_costs_itself(tmp_path, monkeypatch):
    groups = {name: cpu.option_groups_of(quick=True)[name] for name in ("exact", "random masking")}
    monkeypatch.setattr(cpu, "option_groups_of", lambda quick: groups)
    monkeypatch.setattr(cpu, "part_groups", lambda quick: [option_cases.part_cases(1, True)[:2]])

    @contextmanager
    def clocks(cases):
        if any(case.masking == "random" for case in cases):
            raise RuntimeError("no memory")
        yield {case: lambda case=case: case.decode_ratio for case in cases}

    monkeypatch.setattr(measure, "cpu_clocks", clocks)
    with pytest.raises(SystemExit, match="failed: random masking: RuntimeError: no memory"):
        run.main(run.Options(suite=("options",), quick=True, commit="abc", output=tmp_path))
    rows = read_rows(tmp_path / "options_cpu.csv", Row)
    assert [(row.case, row.implementation, row.of_first) for row in rows[:3]] == [
        ("exact", "exact", 1.0),
        ("exact", "half decoded", 0.5),
        ("exact", "prediction held", 1.0),
    ]
    assert [(row.op, row.implementation) for row in rows[3:]] == [
        (option_cases.PART, "encoder"),
        (option_cases.PART, "exact"),
    ]
    assert {row.commit for row in rows} == {"abc"}


def test_the_page_of_options_is_of_rows(tmp_path):
    facts = Facts("a CPU", 2, "2", "3", "abc")
    step = next(iter(cpu.option_groups_of(quick=True).values()))["random"]
    subject = dataclasses.replace(step.subject("options"), case="random masking")
    rows = [
        make_row(subject, what, Times("alternated", (seconds,) * 3), facts, of_first=seconds)
        for what, seconds in (("random", 1.0), ("exact", 1.5))
    ]
    rows += [
        make_row(parts[0].subject("options"), "encoder", Times("alternated", (seconds,) * 3), facts)
        for parts, seconds in zip(cpu.part_groups(quick=True), (2.0, 5.0), strict=True)
    ]
    write_rows(tmp_path / "options_cpu.csv", Row, rows)
    text = options_page(tmp_path)
    assert "| random masking | exact | 1.5 s | 1.50 |" in text
    assert "| 256 | 5 s (2.5) |" in text
    assert "Medians of a CPU, torch 2, 2 threads, commit abc, " in text
    assert options_page(tmp_path / "nowhere") == ""
