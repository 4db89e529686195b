"""benchmarks/strategies.py: statistics, pages, and rows that survive a kill."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
import signal
import statistics as standard
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from scipy import stats

from benchmarks import gpu, strategies
from benchmarks.core.rows import RowWriter, read_rows
from benchmarks.masking import arms, clips, comparison, run, statistics
from benchmarks.pages.strategies import strategies_figures, strategies_page

CPU = torch.device("cpu")


def test_the_paired_interval_is_that_of_the_t_test():
    values = [0.3, 0.1, 0.25, 0.18, -0.02]
    effect = statistics.paired(values)
    expected = stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert (effect.low, effect.high, effect.p) == pytest.approx((low, high, expected.pvalue))
    with pytest.raises(ValueError, match="two or more"):
        statistics.paired([0.1])
    with pytest.raises(ValueError, match="finite"):
        statistics.paired([0.1, float("nan")])


def test_holm_is_its_definition():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert statistics.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_equivalence_agrees_with_two_one_sided_tests():
    values = [0.003, -0.001, 0.002, 0.0005, 0.001]
    expected = max(
        stats.ttest_1samp(values, -0.005, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.005, alternative="less").pvalue,
    )
    assert statistics.equivalence(values, 0.005) == pytest.approx(expected)
    assert statistics.equivalence([0.02, 0.03, 0.025], 0.005) > 0.9
    with pytest.raises(ValueError, match="positive"):
        statistics.equivalence(values, 0)


def test_the_smallest_effect_is_found_as_often_as_it_says():
    effect, draw = statistics.smallest_effect(1.0, 5, alpha=0.025), random.Random(0)
    found = [statistics.paired([draw.gauss(effect, 1) for _ in range(5)]).p < 0.025 for _ in range(1500)]
    assert standard.mean(found) == pytest.approx(statistics.POWER, abs=0.03)


def rows_of(arm, seed, score, by_size=0.0):
    """The rows of a run whose AUC is `score`, and more at larger sizes."""
    common = {"size": "cpu", "steps": 2000, "lr": 1e-3, "mask_ratio": 0.9, "normalize": True, "finished": "now"}
    scores = dict.fromkeys(("moving_object", "velocity", "direction", "position", "shape"), 0.5)
    facts = {"seconds": 1.0, "device": "some CPU", "torch": "2", "commit": "abc"}
    facts |= {} if arm in ("untrained", "supervised") else {"visible_moving": 0.1}
    return [
        run.Row(arm=arm, seed=seed, **common, **scores, **facts, mover=mover, moving=score + by_size * place)
        for place, mover in enumerate((0, *clips.FINE.sizes))
    ]


@pytest.fixture
def made_rows():
    draw = random.Random(1)
    rows = []
    for seed in range(5):
        base = 0.8 + draw.gauss(0, 0.005)
        for arm, gain in {"untrained": -0.1, "supervised": 0.15, "random": 0, "exact": 0.001, "motion": 0.02}.items():
            rows += rows_of(arm, seed, base + gain + draw.gauss(0, 0.002))
    return rows


def page_of(rows, folder):
    with RowWriter(folder / "strategies_cpu.csv", run.Row, rows):
        pass
    return strategies_page(folder)


def test_verdicts_say_what_the_intervals_say(made_rows, tmp_path):
    (group,) = comparison.groups(made_rows)
    gate = comparison.gate(group)
    assert gate.passed
    assert gate.closed == pytest.approx(0.4, abs=0.02)
    assert comparison.adjusted(group)["motion"] < 0.05 < comparison.adjusted(group)["exact"]
    page = page_of(made_rows, tmp_path)
    assert "motion - random: +0.0" in page
    assert "better than random masking" in page
    assert "exact - random" in page
    assert "unresolved" in page
    assert strategies_page(tmp_path) == page  # the same rows, the same page
    assert set(strategies_figures(tmp_path)) == {"strategies_cpu", "strategies_cpu_shown"}


def test_what_the_question_does_not_name_is_exploration(made_rows, tmp_path):
    scores = {("random", row.seed): row.moving for row in made_rows if (row.arm, row.mover) == ("random", 0)}
    for arm, gain in {"tube": -0.03, "grid": 0.03, "hard": 0.0}.items():
        for seed in range(5):
            noise = random.Random(f"{arm}{seed}").gauss(0, 0.002)
            made_rows += rows_of(arm, seed, scores["random", seed] + gain + noise)
    page = page_of(made_rows, tmp_path)
    assert "not adjusted, better than random masking: grid." in page
    assert "not adjusted, worse: tube." in page
    assert "not adjusted, unresolved: hard." in page


def test_fast_and_exact_are_equivalent_where_their_90_percent_interval_lies_within_the_margin(made_rows):
    exact = {row.seed: row.moving for row in made_rows if (row.arm, row.mover) == ("exact", 0)}
    for gains in ((0.001, 0.002, 0.0, -0.001, 0.003), (0.001, 0.006, 0.0, -0.001, 0.009)):
        fast = [row for seed, gain in enumerate(gains) for row in rows_of("fast", seed, exact[seed] + gain)]
        (group,) = comparison.groups([*made_rows, *fast])
        effect, p = comparison.fast_equals_exact(group)
        expected = stats.ttest_1samp(gains, 0).confidence_interval(0.9)
        assert (effect.low, effect.high) == pytest.approx((expected.low, expected.high))
        assert (p < 0.05) == (effect.low > -arms.MARGIN and effect.high < arms.MARGIN)
    assert p > 0.05


def test_rows_of_an_arm_that_is_no_more_are_named(made_rows, tmp_path):
    made_rows += rows_of("gone", 0, 0.5)
    with pytest.raises(ValueError, match=r"a row of arm 'gone', which benchmarks/masking/arms\.py does not have"):
        comparison.groups(made_rows)
    path = tmp_path / "rows.csv"
    with RowWriter(path, run.Row, made_rows):
        pass
    with pytest.raises(SystemExit, match=r"rows\.csv has a row of arm 'gone'"):
        strategies.main(strategies.parse(["--table", "--rows", str(path)]))
    with pytest.raises(SystemExit, match=r"other\.csv does not exist\. Leave out --table"):
        strategies.main(strategies.parse(["--table", "--rows", str(tmp_path / "other.csv")]))


def test_the_second_question_is_of_its_seeds_alone(made_rows, tmp_path):
    gains = dict(zip(range(8), (0.05, 0.05, 0.05, 0.001, 0.003, -0.002, 0.002, 0.001), strict=True))
    raw = [
        dataclasses.replace(row, normalize=False)
        for seed, gain in gains.items()
        for row in rows_of("random", seed, 0.8) + rows_of("exact", seed, 0.8 + gain) + rows_of("tube", seed, 0.79)
    ]
    _, group = comparison.groups([*made_rows, *raw])
    effect, expected = comparison.second(group), stats.ttest_1samp([*gains.values()][3:], 0)
    assert (effect.mean, effect.p) == pytest.approx((0.001, expected.pvalue))
    assert comparison.explored(group).keys() == {"tube"}
    assert "exact - random on seeds 3 to 7 is +0.0010" in (page := page_of([*made_rows, *raw], tmp_path))
    assert "5 of 5 seeds: unresolved." in page
    (longer,) = comparison.groups(dataclasses.replace(row, steps=4000) for row in raw)
    assert comparison.second(longer) == effect
    for other in ({"normalize": True}, {"steps": 1000}, {"mask_ratio": 0.8}):
        (group,) = comparison.groups(dataclasses.replace(row, **other) for row in raw)
        assert comparison.second(group) is None


def test_other_settings_than_the_questions_are_exploration(made_rows):
    (group,) = comparison.groups(dataclasses.replace(row, mask_ratio=0.8) for row in made_rows)
    assert comparison.adjusted(group) == {}
    assert set(comparison.explored(group)) == {"exact", "motion"}


def test_a_column_that_came_later_is_empty_in_earlier_rows(made_rows, tmp_path):
    path = tmp_path / "rows.csv"
    with RowWriter(path, run.Row, made_rows):
        pass
    names = [each.name for each in dataclasses.fields(run.Row)]

    def without(name):
        place = names.index(name)
        lines = [line.split(",") for line in path.read_text().splitlines()]
        (tmp_path / "earlier.csv").write_text("".join(",".join(x[:place] + x[place + 1 :]) + "\n" for x in lines))
        return read_rows(tmp_path / "earlier.csv", run.Row)

    assert without("few_labels")[0].few_labels is None
    with pytest.raises(ValueError, match="other columns than Row, which differs in steps"):
        without("steps")


def test_seeds_that_one_arm_lacks_are_not_compared(made_rows):
    rows = [row for row in made_rows if (row.arm, row.seed) not in {("motion", 0), ("motion", 3)}]
    rows.remove(next(row for row in rows if (row.arm, row.seed) == ("motion", 1)))  # cut short while it was written
    (group,) = comparison.groups(rows)
    assert len(group.differences("motion")) == 2
    assert len(group.differences("exact")) == 5


def test_a_killed_run_goes_on_and_loses_nothing(tmp_path, capsys):
    """The file is cut in the middle of a run, as a kill leaves it; what was whole is not run again."""
    rows, command = tmp_path / "rows.csv", ["--size", "smoke", "--jobs", "1", "--commit", "abc"]
    command += ["--arms", "untrained", "random", "motion", "--seeds", "0", "1", "--rows", str(tmp_path / "rows.csv")]
    strategies.main(strategies.parse(command))
    table, whole = capsys.readouterr().out, read_rows(rows, run.Row)
    assert len(whole) == 6 * (1 + len(clips.FINE.sizes))
    rows.write_text(rows.read_text()[: int(len(rows.read_text()) * 0.6)].replace(",abc", ",kept"))
    strategies.main(strategies.parse(command))
    again = read_rows(rows, run.Row)

    def scores(found):
        return {(row.arm, row.seed, row.mover): (row.moving, row.visible_moving, row.error_moving) for row in found}

    assert scores(again) == scores(whole)
    assert len(again) == len(whole)
    assert [row.commit for row in again] == ["kept"] * 18 + ["abc"] * 18
    assert capsys.readouterr().out.replace("kept, ", "") == table
    strategies.main(strategies.parse([*command, "--table"]))
    assert capsys.readouterr().out.replace("kept, ", "") == table


def test_two_at_once_do_not_write_one_file(tmp_path):
    rows = tmp_path / "rows.csv"
    given = strategies.parse(
        ["--size", "smoke", "--seeds", "0", "--arms", "random", "--rows", str(rows), "--jobs", "1"]
    )
    with FileLock(f"{rows}.lock"), pytest.raises(SystemExit, match="is being written by another"):
        strategies.main(given)
    assert not rows.exists()
    strategies.main(given)
    assert len(read_rows(rows, run.Row)) == 6


@pytest.mark.slow
def test_runs_side_by_side_give_the_rows_of_runs_one_by_one(tmp_path):
    task = run.Task("motion", 0, "smoke", 2, 1e-3, 0.9, True)
    (beside,) = strategies.run_all([task], "abc", CPU, jobs=2)
    alone = run.run(task, "abc", CPU)
    assert [dataclasses.replace(row, seconds=0, finished="") for row in beside] == [
        dataclasses.replace(row, seconds=0, finished="") for row in alone
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how, tmp_path):
    """Ctrl-C reaches the workers too, and does not wait for the runs that are left."""
    rows = tmp_path / "rows.csv"
    call = [sys.executable, strategies.__file__, "--size", "smoke", "--steps", "2", "--jobs", "2", "--rows-only"]
    call += ["--seeds", *map(str, range(5000)), "--rows", str(rows), "--arms", "random"]  # more than have time
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    parent = subprocess.Popen(call, start_new_session=True, preexec_fn=heeded)

    def workers():
        """Those of the session, which no other test is in, but for the parent."""
        found = -1
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
                found += int(session) == parent.pid and state != "Z"
        return found

    try:
        wait_for(lambda: rows.exists() and read_rows(rows, run.Row))
        assert workers() >= 2
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)
        else:
            parent.kill()
        parent.wait(HANGS)
        wait_for(lambda: workers() < 0)
        assert len({row.seed for row in read_rows(rows, run.Row)}) < 5000
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


HANGS = 900  # seconds after which a wait is given up, on the slowest machine


def wait_for(true):
    """Until it is true."""
    until = time.monotonic() + HANGS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.slow
def test_the_stage_of_the_gpu_command_writes_its_rows(tmp_path):
    options = gpu.Options(minutes=1, output=tmp_path, only=(), quick=True, commit="abc")
    (stage,) = (stage for stage in gpu.stages(options) if stage.name == "strategies")
    program, *arguments = stage.command
    assert Path(program) == Path(strategies.__file__)
    strategies.main(strategies.parse(arguments))
    rows = read_rows(tmp_path / "strategies_gpu.csv", run.Row)
    assert {(row.arm, row.seed) for row in rows} == set(itertools.product(arms.PRIMARY, arms.SEEDS))


def test_a_size_with_another_scene_has_its_own_rows(tmp_path, monkeypatch):
    small = dataclasses.replace(arms.SETTINGS["smoke"], cut=clips.COARSE)
    monkeypatch.setitem(arms.SETTINGS, "coarse", small)
    rows = tmp_path / "strategies_coarse.csv"
    command = ["--size", "coarse", "--jobs", "1", "--seeds", "0", "1", "--rows", str(rows)]
    strategies.main(strategies.parse([*command, "--arms", "random", "motion", "hard", "even_start"]))
    found = read_rows(rows, run.Row)
    assert {row.mover for row in found} == {run.ALL, 2}
    assert len(run.finished(found)) == 8
    assert "| AUC by patches of what moves | 2 |" in strategies_page(tmp_path)


@pytest.mark.parametrize("name", [name for name in arms.ARMS if name not in ("untrained", "supervised")])
def test_every_arm_trains(name):
    task = run.Task(name, 0, "smoke", 2, 1e-3, 0.9, True)
    rows = run.run(task, "abc", CPU)
    assert [row.mover for row in rows] == [run.ALL, *clips.FINE.sizes]
    assert all(math.isfinite(value) for row in rows for value in (row.moving, row.error_moving, row.error_ground))


def test_tasks_are_every_run_that_is_asked_for():
    given = strategies.parse(["--arms", "random", "tube", "--seeds", "3", "--lr", "1e-3", "2e-3", "--raw"])
    found = strategies.tasks(given)
    assert [(task.arm, task.seed, task.lr) for task in found] == [
        ("random", 3, 1e-3),
        ("tube", 3, 1e-3),
        ("random", 3, 2e-3),
        ("tube", 3, 2e-3),
    ]
    assert not any(task.normalize for task in found)
