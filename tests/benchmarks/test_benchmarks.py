"""The benchmark suite in small: it checks before it times, writes its rows, and makes tables of rows alone."""

import csv
import dataclasses
import importlib.util
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import estimator_bias
import gpu_cases
import option_cases
import options_cost
import pytest
import report
import report_examples
import scaling
import study
import study_tables
import timm
import torch
from cases import QUICK_STEP
from downstream import accuracies, downstream_table
from finetune_step import FinetuneStep
from loader import check as check_readers
from loader import read_pyav
from op_cases import DrawMask, GatherTokens, ReconstructionError
from rows import read_rows, read_texts, write_rows

from adamae_sampler import AdaMAELoss, ops
from common.cli import parse_arguments
from common.lists import VideoEntry
from common.pretrain_recipe import PretrainRecipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick"]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


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
def test_tables_are_made_of_rows_alone(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(report.Options(readme, (results,)))
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "draw_mask 2 x 128" in text
    again = readme.read_text()
    report.main(report.Options(readme, (results,)))
    assert readme.read_text() == again
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmarks: begin"):
        report.main(report.Options(readme, (results,)))
    with pytest.raises(ValueError, match="has no rows"):
        report.main(report.Options(readme, (tmp_path / "nowhere",)))


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


@pytest.mark.slow
def test_the_study_runs_every_stage_for_every_start(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "downstream.py"), "--starts", "adaptive", "scratch"]
    command += ["--seeds", "3", "4", "--pretrain-steps", "2", "--finetune-steps", "2", "--labels", "40"]
    command += ["--probe-labels", "40", "--test-clips", "30", "--output", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["start"], row["seed"]) for row in rows] == [
        ("adaptive", "3"), ("scratch", "3"), ("adaptive", "4"), ("scratch", "4")
    ]  # fmt: skip
    assert all(0 <= float(row["finetune_top1"]) <= 100 for row in rows)
    assert all((row["reconstruction"] == "") == (row["start"] == "scratch") for row in rows)
    assert "| scratch | " in done.stdout


def test_tables_of_the_examples_are_of_presets_and_rows(tmp_path):
    readme, results = tmp_path / "README.md", ROOT / "benchmarks" / "results"
    each = [getattr(report_examples, name) for name in ("PROJECTION", "SCALING", "LOADER", "DOWNSTREAM")]
    markers = [line for pair in each for line in (*pair, "between")]
    readme.write_text("\n".join(["before", *markers, "after", ""]))
    report_examples.main(report_examples.Options(readme, results))
    text = readme.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| SSv2, pre-training |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == ["65,981", "2048", "0.0012", "135.1 M"]  # 800 x 168,913 / 2048 steps of 1.5e-4 x 8
    row = report_examples.fastest(results, report_examples.PretrainRecipe)
    assert int(cells[5].replace(",", "")) == round(65_981 * 2048 / row.clips_per_s / 3600)
    assert int(cells[6].replace(",", "")) == pytest.approx(800 * 551 * 8 / 3600, rel=1e-3)  # Table 4's epoch, 8 GPUs
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_studys_table_has_mean_and_deviation():
    columns = ["probe_top1", "probe_direction", "probe_shape", "finetune_top1", "finetune_direction", "finetune_shape"]
    rows = [
        {"start": start, "reconstruction": loss, **dict.fromkeys(columns, "50"), "probe_top1": probe}
        for start, probe, loss in (("adaptive", "10", "0.5"), ("scratch", "5", ""), ("adaptive", "14", "0.7"))
    ]
    lines = downstream_table(rows).splitlines()
    assert lines[2:] == [
        "| adaptive | 12.0 ± 2.8" + " | 50.0" * 5 + " | 0.6000 |",
        "| scratch | 5.0" + " | 50.0" * 5 + " |  |",
    ]


def test_accuracies_of_class_direction_and_shape(tmp_path):
    (tmp_path / "predictions.csv").write_text(
        "video,label,rank,first five classes,their probabilities\n"
        "a,6,1,6 5 0 1 2,\n"  # right
        "b,6,2,2 6 0 1 3,\n"  # the direction (6 % 4)
        "c,6,3,7 5 6 1 2,\n"  # the shape (6 // 4)
        "d,6,9,0 5 1 2 3,\n"
    )
    assert accuracies(tmp_path / "predictions.csv") == (25, 50, 50)


def test_the_step_of_fine_tuning_is_a_step():
    """At first the 400 classes are about equally likely."""
    step = FinetuneStep(clips=1, img_size=32, depth=1)
    assert float(step.make(torch.device("cpu"))()) == pytest.approx(math.log(400), abs=0.1)


def test_efficiency_on_several_gpus_by_hand():
    links = scaling.Links("", link=100.0, network=10.0)
    # 8 GPUs: 2 x 7/8 x 1000 / 100 = 17.5 s, hidden behind two thirds of 60 s but for the last bucket, which is all.
    assert scaling.efficiency(60, 1000, 8, links) == (17.5, pytest.approx(60 / 77.5))
    # 4 machines more: 17.5 + 2 x 3/4 x 1000 / 10 = 167.5 s, of which 40 are hidden.
    takes, share = scaling.efficiency(60, 1000, 32, links)
    assert (takes, share) == (167.5, pytest.approx(60 / (60 + 167.5)))
    assert scaling.efficiency(60, 10**9, 1, links) == (0, 1)
    size = 100 * 2**20  # four buckets
    takes, share = scaling.efficiency(1.0, size, 8, scaling.Links("", link=size, network=1.0))
    assert takes == 1.75
    assert share == pytest.approx(1 / (1 + 1.75 - 2 / 3))
    assert scaling.gradient_bytes() == pytest.approx(4 * 102e6, rel=0.02)


@pytest.mark.slow
def test_readers_are_timed_after_their_frames_are_compared(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--videos", "1", "--size", "96", "128"]
    command += ["--seconds", "1", "--rounds", "2", "2", "--no-step", "--output", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    reads = [row for row in rows if row["what"] == "read and crop"]
    assert {"PyAV"} <= {row["decoder"] for row in reads}
    assert len({row["videos"] for row in reads}) == 3
    assert all(float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"]) for row in rows)
    assert "| files, 128 x 96, key frames every 250 |" in done.stdout
    if importlib.util.find_spec("torchcodec") is None:
        assert "torchcodec is not installed and is left out" in done.stdout


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
    assert "errors of the token" in capsys.readouterr().out


def test_every_option_is_timed():
    """That each is a step that trains is shown by the rehearsal of gpu.py, which times them all."""
    groups = option_cases.option_groups(QUICK_STEP)
    assert all(len(cases) > 1 for cases in groups.values())
    seen = {name for cases in groups.values() for case in cases.values() for name in case.options}
    assert seen == {"score_network", "sample_from", "num_masks", "decode_ratio", "fused_head"}
    units = {unit.case for unit in gpu_cases.units("options", torch.device("cpu"), quick=True)}
    assert units >= {case for cases in groups.values() for case in cases.values()}
    assert {part.size.num_tokens for part in option_cases.part_cases(2, quick=True)} == {128, 256}


def test_options_are_measured_in_turns_and_a_group_that_fails_costs_itself(tmp_path, monkeypatch, capsys):
    groups = option_cases.option_groups(QUICK_STEP)
    few = {name: dict(list(groups[name].items())[:2]) for name in ("exact", "random masking")}
    monkeypatch.setattr(options_cost, "option_groups", lambda exact: few)
    monkeypatch.setattr(options_cost, "part_cases", lambda clips, quick: option_cases.part_cases(1, True)[:2])

    @contextmanager
    def clocks(cases):
        if any(case.masking == "random" for case in cases):
            raise RuntimeError("no memory")
        yield {case: lambda: 0.5 for case in cases}

    monkeypatch.setattr(options_cost, "cpu_clocks", clocks)
    with pytest.raises(SystemExit, match="failed: random masking: RuntimeError: no memory"):
        options_cost.main(0.1, quick=True, output=tmp_path, commit="abc")
    rows = read_rows(tmp_path / "options_cpu.csv", options_cost.Row)
    assert [(row.group, row.what, row.commit) for row in rows] == [
        ("exact", "exact", "abc"),
        ("exact", "half decoded", "abc"),
        (options_cost.SCALE, "encoder", "abc"),
        (options_cost.SCALE, "exact", "abc"),
    ]
    assert (tmp_path / "options_cpu.png").exists()


def test_tables_of_options_are_of_rows(tmp_path):
    facts = {"threads": 2, "device": "a CPU", "torch": "2", "commit": "abc", "repeats": 3, "q1_s": 1.0, "q3_s": 1.0}
    rows = [
        options_cost.Row("random masking", what, tokens=1568, median_s=seconds, of_first=seconds, **facts)
        for what, seconds in (("random", 1.0), ("exact", 1.5))
    ]
    rows += [
        options_cost.Row(options_cost.SCALE, "encoder", tokens=tokens, median_s=seconds, of_first=1.0, **facts)
        for tokens, seconds in ((1568, 2.0), (3136, 5.0))
    ]
    write_rows(tmp_path / "options_cpu.csv", options_cost.Row, rows)
    text = report.options_tables(tmp_path)
    assert "| random masking | exact | 1.5 s | 1.50 |" in text
    assert "| 3,136 | 5 s (2.5) |" in text
    assert "a CPU, torch 2, 2 threads, commit abc; `options_cpu.csv`." in text
    assert report.options_tables(tmp_path / "nowhere") == ""


def test_every_size_and_variant_of_the_study_is_a_recipe_and_a_model():
    pairs = [(size, "exact") for size in study.SIZES] + [("small", variant) for variant in study.VARIANTS]
    for size, variant in pairs:
        arguments = study.arguments(study.Options(size=size, probe=False), variant, 0)
        recipe, _ = parse_arguments(PretrainRecipe, arguments, "sprites", None)
        with torch.device("meta"):
            model = timm.create_model(recipe.model, **recipe.model_args())
        AdaMAELoss(**recipe.loss_args())
        assert 0 < model.sampler.num_visible < model.sampler.num_tokens / 3


@pytest.mark.slow
def test_the_study_of_options_trains_measures_and_probes(tmp_path):
    options = study.Options(variants=("fast", "plackett-luce"), steps=2, probe_labels=40, test_clips=30, jobs=2)
    rows = [study.run(options, name, 3, 1.25, str(tmp_path), "abc") for name in options.variants]
    log = (tmp_path / "plackett-luce-3" / "log.txt").read_text()
    assert "num_masks=4, estimator=plackett_luce" in log
    assert "4 videos x 1 devices" in log
    assert "0.064 x 4 / 256 = 0.001" in log
    for row in rows:
        assert row.p_ratio > 0.2
        assert 0 < row.visible_moving < 1
        assert row.reconstruction < 1
        assert row.error_ratio > 1  # sprites are further from grey than their background
        assert 0 <= row.probe_top1 <= 100
    timed = study.run(study.Options(budget="time", steps=4, probe=False), "half", 3, 2.0, str(tmp_path), "abc")
    assert timed.steps == 2
    assert timed.probe_top1 is None
    text = study_tables.study_table(
        [{name: "" if each is None else str(each) for name, each in vars(row).items()} for row in rows]
    )
    assert text.count("| 1.25 |") == 2
    facts = study_tables.study_facts(
        [{"variant": name, "device": "a CPU", "torch": "2", "commit": "abc"} for name in ("random", "exact", "masks4")],
        Path("rows.csv"),
    )
    assert facts == "`rows.csv`, a CPU, torch 2, commit abc. Variants: masks4 `--num-masks 4`."
    # A study that was cut short goes on, unless its settings have changed.
    path = tmp_path / "rows.csv"
    write_rows(path, study.Row, rows)
    same = dataclasses.replace(options, output=path, add=True)
    assert [(row.variant, row.normalize_target) for row in study.rows_to_keep(same)] == [
        ("fast", False), ("plackett-luce", False)
    ]  # fmt: skip
    again = dataclasses.replace(same, add=False, seeds=(3,))
    assert study.rows_to_keep(again) == []
    with pytest.raises(ValueError, match="runs that would be lost, since these do not repeat them: plackett-luce 3"):
        study.rows_to_keep(dataclasses.replace(again, variants=("fast",)))
    with pytest.raises(
        ValueError, match=r"'small', 'steps', 2, False, True\), and these are \('small', 'steps', 2, True"
    ):
        study.rows_to_keep(dataclasses.replace(same, normalize_target=True))
    # Columns that came later were not measured then; one that is needed is missed by its name.
    earlier = [{name: text for name, text in row.items() if name != "error_ratio"} for row in read_texts(path)]
    _write_texts(path, earlier)
    assert [row.error_ratio for row in study.rows_to_keep(same)] == [None, None]
    _write_texts(path, [{name: text for name, text in row.items() if name != "steps"} for row in earlier])
    with pytest.raises(ValueError, match="other columns than Row, which differs in steps"):
        study.rows_to_keep(same)
    with pytest.raises(ValueError, match="no variant quick; there are random, tube"):
        study.Options(variants=("quick",))
    with pytest.raises(ValueError, match="seeds is empty"):
        study.Options(seeds=())
    with pytest.raises(ValueError, match="probe_labels=0, expected 1 or more; --no-probe"):
        study.Options(probe_labels=0)


def _write_texts(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
