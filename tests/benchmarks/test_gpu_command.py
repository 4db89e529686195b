"""benchmarks/gpu.py rehearsed whole, on a CPU, as on a GPU machine: from a checkout, without what is missing there.

The checkout is a copy in which some cases fail, one runs out of memory, one takes its process with it and one waits.
"""

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu
from benchmarks.suites.gpu import SUITES

ROOT = Path(__file__).parents[2]

# What a bare GPU machine's image has; with what these need.
PACKAGES = (
    *("torch", "triton", "timm", "einops", "hypothesis", "pytest", "pytest-xdist", "accelerate", "transformers"),
    *("safetensors", "matplotlib", "tqdm", "tensorboard", "numpy"),
)

INJECTED = """

# ------------------------------------------------------------------------------------- what the rehearsal injects
import os
import time
from pathlib import Path


class FailingLoss(SamplingLoss):
    def ours(self, x):
        raise RuntimeError("injected failure")


class OutOfMemory(StepCase):
    def make(self, device):
        return torch.empty(2**60, device=device)


class Dying(StepCase):
    def make(self, device):
        os.abort()


class Waiting(StepCase):
    def make(self, device):
        waits = Path(os.environ["REHEARSAL_WAITS"])
        while waits.exists():
            waits.write_text("an hour is over")
            time.sleep(0.1)
        return super().make(device)


def _injected(quick, steps=_STEPS["steps"]):
    tiny = {"dtype": torch.float32, "clips": 1, "img_size": 64, "depth": 1, "masking": "frame"}
    first, second, *others = steps(quick)
    strange = [kind(mask_ratio=ratio, **tiny) for kind, ratio in ((OutOfMemory, 0.25), (Waiting, 0.5), (Dying, 0.75))]
    return [first, strange[0], second, *strange[1:], *others]


_STEPS["steps"] = _injected
QUICK_OPS = (FailingLoss(2, 130, 6, "forward+backward"), *QUICK_OPS)
"""

SITE = """
import os
import socket
import sys
import time


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: a bare GPU machine has none", name=name)


def refuse(self, address, connect=socket.socket.connect):
    if self.family != socket.AF_UNIX:  # by which processes of the machine reach each other
        raise OSError("a bare GPU machine has no network")
    return connect(self, address)


sys.path[:] = [each for each in sys.path if each != {root!r}]  # the editable installation
sys.meta_path.insert(0, Missing())
# The time ends when the case that waits says so, on a fast machine and on a slow one.
clock, waits = time.monotonic, os.environ["REHEARSAL_WAITS"]
time.monotonic = lambda: clock() + 3600 * (os.path.exists(waits) and os.path.getsize(waits) > 0)
socket.socket.connect = refuse
"""


def missing_there():
    """The top-level modules installed here of which a bare GPU machine has none."""
    wanted, there = list(PACKAGES), set()
    while wanted:
        name = canonical(wanted.pop())
        if name in there:
            continue
        there.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform, or an extra's
            continue
        needed = (Requirement(each) for each in needs)
        wanted += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    owners = importlib.metadata.packages_distributions()
    return {module for module, dists in owners.items() if not {canonical(each) for each in dists} & there}


def canonical(name):
    return name.lower().replace("_", "-").replace(".", "-")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Rehearsal:
    def __init__(self, folder):
        self.checkout, self.output, self.waits = folder / "checkout", folder / "rows", folder / "waits"
        for name in ("adamae_sampler", "benchmarks", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, self.checkout / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        with (self.checkout / "benchmarks" / "suites" / "gpu.py").open("a") as file:
            file.write(INJECTED)
        blocked = missing_there()
        assert {"tyro", "av", "hiera", "lightly", "wandb"} <= blocked
        assert not {"torch", "timm", "xdist", "_pytest", "PIL", "sympy"} & blocked
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE.format(blocked=blocked, root=str(ROOT)))
        self.environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
        self.environment |= {"PYTHONPATH": str(site), "REHEARSAL_WAITS": str(self.waits), "CUDA_VISIBLE_DEVICES": ""}

    def call(self, *arguments):
        command = [sys.executable, str(self.checkout / "benchmarks" / "gpu.py"), "--quick", "--commit", "abc123"]
        done = subprocess.run(
            [*command, "--output", str(self.output), *arguments],
            env=self.environment,
            cwd=self.checkout.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr, done.stderr
        return done

    def steps(self):
        return {(row["case"], row["implementation"]) for row in rows(self.output / "steps_cpu.csv")}

    def failures(self):
        path = self.output / "failures_cpu.csv"
        return {(row["stage"], row["what"]): row["error"] for row in rows(path)} if path.exists() else {}

    def statuses(self):
        return {row["stage"]: row["status"] for row in rows(self.output / "stages.csv")}


# Without "options", "finetune" and "sweep", which run the program of "steps"; test_gpu_parts.py has their cases.
REHEARSED = ("machine", "kernel-tests", "gpu-tests", "steps", "profile", "ops", "compiled", "sanitizer", "ncu")
TINY = "ViT-B of depth 1, {}, 1 x 16x64x64, float32"
EXACT = "ViT-B of depth 1, adaptive 95%, 2 x 16x64x64, float32"
FAST = f"{EXACT}, score_network=pooled, sample_from=pixels, decode_ratio=0.5"


@pytest.mark.slow
def test_the_whole_command_on_a_bare_machine_in_two_calls(tmp_path):
    rehearsal = Rehearsal(tmp_path)
    rehearsal.waits.touch()
    first = rehearsal.call("--only", "steps", "ops", "--minutes", "60")  # which end while a case waits
    assert first.returncode == 1, first.stdout  # one case had failed by then
    assert rehearsal.steps() == {(EXACT, "adamae_sampler"), (FAST, "adamae_sampler")}, first.stdout
    assert rehearsal.statuses() == {"steps": "time"}
    out_of_memory = f"{TINY.format('frame 25%')}, adamae_sampler"
    assert list(rehearsal.failures()) == [("steps", out_of_memory)]
    assert "allocate" in rehearsal.failures()["steps", out_of_memory]
    assert "Not measured yet: steps: 7 of 9; ops: " in first.stdout
    assert f"| {EXACT} | " in first.stdout
    assert "ncu" not in first.stdout.splitlines()[0]  # neither stage needs it
    before = rows(rehearsal.output / "steps_cpu.csv")

    rehearsal.waits.unlink()
    second = rehearsal.call("--minutes", "60", "--only", *REHEARSED)
    assert second.returncode == 1
    if shutil.which("ncu") is None:
        assert "without ncu (of the CUDA toolkit), so no stage ncu" in second.stdout.splitlines()[0]
    assert rows(rehearsal.output / "steps_cpu.csv")[:2] == before  # kept, not measured again
    measured = {implementation for case, implementation in rehearsal.steps() if case == EXACT}
    assert measured == {"adamae_sampler", "official", "matrix products alone"}, second.stdout
    assert (TINY.format("frame 50%"), "adamae_sampler") in rehearsal.steps()  # that waited
    failing = "sampling_loss 2 x 130, 6 visible, float32, forward+backward, adamae_sampler"
    failures = rehearsal.failures()
    assert set(failures) == {
        ("steps", out_of_memory),
        ("steps", f"{TINY.format('frame 75%')}, adamae_sampler"),
        ("ops", failing),
    }
    assert failures["steps", f"{TINY.format('frame 75%')}, adamae_sampler"] == "its process ended (by signal 6)"
    assert failures["ops", failing] == "RuntimeError: injected failure"
    for (stage, what), error in failures.items():
        assert f"FAILED {stage}: {what}: {error}" in second.stdout
    statuses = {name: "done" for name in ("machine", "kernel-tests", "gpu-tests", "profile", "compiled")}
    statuses |= {"steps": "failed", "ops": "failed"}
    assert {name: how for name, how in rehearsal.statuses().items() if name not in ("sanitizer", "ncu")} == statuses
    assert "Not measured yet: steps: 2 of 9; ops: 1 of 27; options: 11 of 11; " in second.stdout

    ops = rows(rehearsal.output / "ops_cpu.csv")
    for name in ("draw_mask", "gather_tokens", "assemble_tokens", "reconstruction_error", "sampling_loss"):
        implementations = {row["implementation"] for row in ops if row["op"] == name}
        assert implementations == {"adamae_sampler", "official", "device copy"}, name
    assert {"device copy", "official"} == {row["implementation"] for row in ops if "2 x 130" in row["case"]}
    (compiled,) = rows(rehearsal.output / "compiled_cpu.csv")
    assert compiled["commit"] == "abc123"
    assert float(compiled["median_s"]) > 0
    (machine,) = rows(rehearsal.output / "machine_cpu.csv")
    assert float(machine["copy_bytes_per_s"]) > 0
    kinds = {row["kind"] for row in rows(rehearsal.output / "profile_cpu.csv")}
    assert kinds == {"family", "attention", "waits"}  # the embedding is a matrix product
    tests = rows(rehearsal.output / "tests_cpu.csv")
    assert {row["outcome"] for row in tests if "test_gpu" not in row["test"]} == {"passed"}
    summary = (rehearsal.output / "summary_cpu.md").read_text()
    line = next(line for line in summary.splitlines() if line.startswith(f"| {EXACT} |"))
    assert len([cell for cell in line.strip("| ").split("|") if cell.strip()]) >= 4  # floor, measured, ratio, rate


def test_rows_of_another_version_of_the_package_are_set_aside(tmp_path, monkeypatch, capsys):
    package = tmp_path / "adamae_sampler" / "mask.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    output = tmp_path / "rows"
    options = gpu.parse(["--quick", "--output", str(output), "--commit", "abc"])
    for _ in range(2):  # the second call goes on in the same folder
        gpu.set_others_aside(options)
        (output / "ops_cpu.csv").write_text("rows\n")
    assert not Path(f"{output}-1").exists()
    package.write_text("# mended\n")
    gpu.set_others_aside(options)
    assert f"now in {output}-1" in capsys.readouterr().out
    assert (Path(f"{output}-1") / "ops_cpu.csv").read_text() == "rows\n"
    assert [path.name for path in output.iterdir()] == ["versions.json"]


def test_every_suite_has_a_stage():
    commands = {stage.name: stage.command for stage in gpu.stages(gpu.parse(["--quick", "--commit", "abc"]))}
    for suite in SUITES:
        assert commands[suite][:3] == ("-m", "benchmarks.stages.suite", suite)
    assert {*REHEARSED, *SUITES, "strategies"} == set(commands)  # test_strategies.py runs the last


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
def test_a_stage_is_ended_with_all_that_it_started(tmp_path):
    grandchild = tmp_path / "grandchild"
    code = (
        "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(grandchild)!r}).write_text(str(child.pid)); print('started', flush=True); time.sleep(600)"
    )
    with (tmp_path / "log.txt").open("w") as log:
        assert gpu.run(gpu.Stage("endless", 9, ("-c", code)), 3, log) == "time"
        assert gpu.run(gpu.Stage("broken", 9, ("-c", "raise SystemExit(4)")), 60, log) == "failed"
        assert gpu.run(gpu.Stage("well", 9, ("-c", "print('well')")), 60, log) == "done"
    assert (tmp_path / "log.txt").read_text() == "started\nwell\n"
    number = int(grandchild.read_text())
    for _ in range(100):
        if not running(number):
            break
        time.sleep(0.1)
    assert not running(number)


def running(number):
    state = Path(f"/proc/{number}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stages_that_were_stopped_go_on_once_the_others_have_run(tmp_path, monkeypatch):
    calls = []

    def run(stage, limit_s, log):
        calls.append((stage.name, limit_s < 100))
        return "time" if stage.name == "slow" and limit_s < 100 else "failed" if stage.name == "broken" else "done"

    monkeypatch.setattr(gpu, "run", run)
    wanted = [gpu.Stage(name, 50, ()) for name in ("slow", "broken", "quick")]
    statuses = gpu.Statuses(tmp_path)
    gpu.run_all(wanted, time.monotonic() + 1000, statuses, None)
    assert calls == [("slow", True), ("broken", True), ("quick", True), ("slow", False)]
    again = gpu.Statuses(tmp_path)
    assert [again.of(name) for name in ("slow", "broken", "quick", "other")] == ["done", "failed", "done", ""]
    assert again.failed == ["broken"]
    calls.clear()
    gpu.run_all(wanted, time.monotonic() + 1000, again, None)
    assert calls == [("broken", True)]
    gpu.run_all([*wanted, gpu.Stage("late", 50, ())], time.monotonic() - 1, again, None)
    assert again.of("late") == ""


def test_what_is_missing_is_named_in_the_first_line(tmp_path, monkeypatch):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    absent = [gpu.Stage("ncu", 1, (), tool="ncu")]
    assert gpu.first_line(["timm", "einops"], absent) == (
        "missing: pip install timm einops; without ncu (of the CUDA toolkit), so no stage ncu"
    )
    assert gpu.first_line([], []) == "everything that is needed is here"
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    (tmp_path / "Python.h").unlink()
    assert gpu.first_line([], []).startswith("missing: a C compiler (gcc; Triton builds")
    assert "Python.h (python3-dev; " in gpu.first_line([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sleep"], "invalid choice: 'sleep' (choose from"),
        (["--minutes", "0"], "--minutes 0, expected more than 0"),
        (["--output", __file__], "is a file, expected a folder"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_stage_that_was_done_runs_again_for_rows_that_are_missing(tmp_path):
    options = gpu.parse(["--quick", "--output", str(tmp_path), "--commit", "abc"])
    statuses = gpu.Statuses(tmp_path)
    assert gpu.stages_with_missing_rows(options, statuses) == []  # nothing has run
    for name, status in (("ops", "done"), ("kernel-tests", "done"), ("sweep", "failed")):
        statuses.set(name, status, 1)
    missing = gpu.stages_with_missing_rows(options, statuses)
    assert set(missing) == {"steps", "ops", "compiled", "options", "finetune", "sweep", "profile", "machine"}
    statuses.reopen(missing)
    assert [statuses.of(name) for name in ("ops", "kernel-tests", "sweep", "steps")] == ["time", "done", "failed", ""]


@pytest.mark.slow
def test_without_a_gpu_nothing_is_measured_at_full_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(tmp_path / "rows")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "no GPU that torch can use; --quick rehearses on a CPU" in done.stdout
    assert not (tmp_path / "rows").exists()


def test_versions_are_those_of_the_package_that_runs():
    found = gpu.versions(quick=True)
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["size"] != gpu.versions(quick=False)["size"]
    assert json.loads(json.dumps(found)) == found
