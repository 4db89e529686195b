"""Everything that needs a GPU, in one command: the kernels are checked, then measured, and one table says how it went.

    python benchmarks/gpu.py                              # about half an hour; rows, log and table in runs/gpu
    python benchmarks/gpu.py --minutes 9 --output DIR     # the same call again goes on where the time ended
    python benchmarks/gpu.py --only ops                   # one stage, or several
    python benchmarks/gpu.py --quick --output DIR         # tiny sizes, also on a CPU: would it work?

Each stage is a process of its own with a limit of time, and none needs another's success. Rows are written as they
come: a case that fails or runs out of memory is named and costs only itself. What is most worth knowing runs first, and
what ran out of its limit goes on at the end, if there is time. Rows of another version of the package, of torch or of
triton are set aside, into DIR-1 and so on. Ends with code 1 if something failed; running out of time is no failure.
On a machine that is lent for half an hour, --minutes 20 leaves time to install and to copy the rows back.

Works from a checkout, installed or not, without a network. The first line names what is missing. To keep the rows and
make their page: cp runs/gpu/*.csv benchmarks/results/ && python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# This file and commit.py use the standard library alone: where torch cannot be imported, the first line says so.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare checkout is not installed
from benchmarks.core.commit import current_commit  # noqa: E402

NEEDED = ("torch", "triton", "timm", "einops", "safetensors", "numpy", "pytest", "hypothesis")
_SUMMARY_S = 25.0  # kept for the table at the end
_GRACE_S = 5.0  # between asking a stage to end and ending it
_KERNEL_TESTS = ("ops/test_kernels.py", "ops/test_pixel_kernels.py", "ops/test_kernel_registration.py")
_QUICK_TESTS = "test_empty_batch or test_sampling_loss_clamps or registration and sampling_loss"


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes:
        name: for people and --only.
        limit_s: seconds that it may take while others wait.
        command: the arguments of Python.
        tool: a program that it needs.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    tool: str = ""


@dataclass(frozen=True)
class Options:
    """The settings; `parse` explains each."""

    minutes: float
    output: Path
    only: tuple[str, ...]
    quick: bool
    commit: str


def stages(options: Options) -> list[Stage]:
    """The stages, the most informative first."""

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return "-m", f"benchmarks.stages.{name}", *arguments, *told(options)

    def tests(processes: int, *files: str, quick: str = "") -> tuple[str, ...]:
        command = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "benchmarks.stages.outcomes"]
        command += ["--outcomes", str(options.output), *(str(ROOT / "tests" / file) for file in files)]
        processes = min(processes, os.cpu_count() or 1)
        if importlib.util.find_spec("xdist") and processes > 1 and not options.quick:
            command += ["-p", "xdist", "-n", str(processes)]
        return (*command, "-k", quick) if options.quick else tuple(command)

    return [
        Stage("machine", 60, module("machine")),
        Stage("kernel-tests", 150, tests(12, *_KERNEL_TESTS, quick=_QUICK_TESTS)),
        Stage("gpu-tests", 120, tests(4, "ops/test_gpu.py")),
        Stage("steps", 240, module("suite", "steps")),
        Stage("profile", 120, module("step_profile")),
        Stage("ops", 160, module("suite", "ops")),
        Stage("compiled", 360, module("suite", "compiled")),
        Stage("options", 240, module("suite", "options")),
        Stage("sanitizer", 240, module("tools", "sanitizer"), tool="compute-sanitizer"),
        Stage("finetune", 90, module("suite", "finetune")),
        Stage("ncu", 120, module("tools", "ncu"), tool="ncu"),
        Stage("sweep", 300, module("suite", "sweep")),
        Stage("strategies", 420, strategies_command(options)),
    ]


def strategies_command(options: Options) -> tuple[str, ...]:
    """Compares masking strategies; a run that has its rows is passed over, so the stage goes on where it ended."""
    size = "smoke" if options.quick else "gpu"
    rows = str(options.output / "strategies_gpu.csv")
    return (
        str(ROOT / "benchmarks" / "strategies.py"),
        "--size",
        size,
        "--rows",
        rows,
        "--commit",
        options.commit,
        "--rows-only",
    )


def told(options: Options) -> list[str]:
    """The arguments that every stage gets."""
    quick = ["--quick"] if options.quick else []
    return ["--output", str(options.output), "--commit", options.commit, *quick]


def summary_command(options: Options) -> list[str]:
    """Makes the table of the rows."""
    return [sys.executable, "-m", "benchmarks.pages.gpu_summary", *told(options)]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="from the start to the end of the table (30)")
    add("--output", type=Path, default=Path("runs/gpu"), help="folder for rows, log and table (runs/gpu)")
    names = [stage.name for stage in stages(Options(0, Path(), (), False, ""))]
    add("--only", nargs="+", default=(), choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    add("--quick", action="store_true", help="tiny sizes, also on a CPU: would it work?")
    add("--commit", default="", help="what the rows name as the commit; git is asked if it is empty")
    given = vars(parser.parse_args(arguments))
    options = Options(
        **{
            **given,
            "output": given["output"].resolve(),
            "only": tuple(given["only"]),
            "commit": given["commit"] or current_commit(),
        }
    )
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}, expected more than 0")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output} is a file, expected a folder")
    return options


def main(options: Options) -> int:
    """Runs the stages and the table; 1 if something failed."""
    deadline = time.monotonic() + 60 * options.minutes - _SUMMARY_S
    wanted = [stage for stage in stages(options) if not options.only or stage.name in options.only]
    absent = [stage for stage in wanted if stage.tool and shutil.which(stage.tool) is None]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    print(first_line(missing, absent), flush=True)
    if options.commit == "unknown":
        print("the rows will name no commit: git knows none here; --commit gives one", flush=True)
    if "torch" in missing or not (options.quick or sees_a_gpu()):
        return 2
    if wanted == absent:
        print("nothing to run", flush=True)
        return 2
    set_others_aside(options)
    statuses, interrupted = Statuses(options.output), False
    statuses.reopen(stages_with_missing_rows(options, statuses))
    with (options.output / "log.txt").open("a", encoding="utf-8") as log, ending_as_interrupted():
        try:
            run_all([stage for stage in wanted if stage not in absent], deadline, statuses, log)
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: the same command goes on from here", flush=True)
    summary = subprocess.run(summary_command(options), cwd=ROOT, env=environment())
    return 130 if interrupted else 1 if summary.returncode or statuses.failed else 0


def first_line(missing: Iterable[str], absent: Iterable[Stage]) -> str:
    """Names what is missing: first what the stages need and how to get it, then what they do without."""
    packages = list(missing)
    parts = [f"pip install {' '.join(packages)}"] if packages else []
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        parts.append("a C compiler (gcc; Triton builds its launchers with it)")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        parts.append("Python.h (python3-dev; Triton builds its launchers with it)")
    without = [f"{stage.tool} (of the CUDA toolkit), so no stage {stage.name}" for stage in absent]
    if importlib.util.find_spec("xdist") is None:
        without.append("pytest-xdist, so the tests run one by one")
    line = f"missing: {'; '.join(parts)}" if parts else "everything that is needed is here"
    return f"{line}; without {'; without '.join(without)}" if without else line


def stages_with_missing_rows(options: Options, statuses: Statuses) -> list[str]:
    """The stages that are done but for rows: of cases that came later, or of rows that were taken away."""
    if not statuses.any_done:
        return []
    command = [*summary_command(options), "--left"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    return done.stdout.split()


def sees_a_gpu() -> bool:
    """Whether torch sees a GPU; prints a line if not."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    found = subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
    if not found:
        print("no GPU that torch can use; --quick rehearses on a CPU, in tiny sizes", flush=True)
    return found


def set_others_aside(options: Options) -> None:
    """Moves rows of another version away, and notes the version of those to come."""
    known, mine = options.output / "versions.json", versions(options.quick)
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) != mine:
        places = (options.output.with_name(f"{options.output.name}-{number}") for number in range(1, 1000))
        aside = next(place for place in places if not place.exists())
        options.output.rename(aside)
        print(f"{options.output} has rows of other versions, which are now in {aside}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(mine, indent=1), encoding="utf-8")


def versions(quick: bool) -> dict[str, str]:
    """Rows of one run share these: a hash of the package's sources, the size, and the versions of torch and triton."""
    sources = hashlib.sha256()
    for path in sorted((ROOT / "adamae_sampler").rglob("*.py")):
        sources.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    found = {"adamae_sampler": sources.hexdigest()[:16], "size": "quick" if quick else "full"}
    for name in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Statuses:
    """How each stage ended, in stages.csv: "done", "failed" or "time".

    Args:
        folder: of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stages.csv"
        self._known: dict[str, tuple[str, float]] = {}
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                self._known = {row["stage"]: (row["status"], float(row["seconds"])) for row in csv.DictReader(file)}

    def of(self, stage: str) -> str:
        """How a stage ended; empty if it has not run."""
        return self._known.get(stage, ("", 0.0))[0]

    @property
    def any_done(self) -> bool:
        """Whether any stage is done."""
        return any(status == "done" for status, _ in self._known.values())

    def reopen(self, stages: Iterable[str]) -> None:
        """Stages that are to run again, though they were done."""
        for stage in stages:
            if self.of(stage) == "done":
                self.set(stage, "time", 0.0)

    @property
    def failed(self) -> list[str]:
        """The stages that failed."""
        return [name for name, (status, _) in self._known.items() if status == "failed"]

    def set(self, stage: str, status: str, seconds: float) -> None:
        """Writes how a stage ended, and its seconds in all."""
        self._known[stage] = (status, seconds + self._known.get(stage, ("", 0.0))[1])
        partial = self._path.with_name("stages.csv.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("stage", "status", "seconds"))
            writer.writerows((name, how, f"{took:.1f}") for name, (how, took) in self._known.items())
        partial.replace(self._path)


def run_all(wanted: Sequence[Stage], deadline: float, statuses: Statuses, log: IO[str]) -> None:
    """Runs what is not done, each within its limit; then goes on with those that it stopped, if there is time."""
    for limited in (True, False):
        for stage in wanted:
            left = deadline - time.monotonic()
            ended = statuses.of(stage.name)
            if ended == "done" or (not limited and ended != "time") or left <= 0:
                continue
            began = time.monotonic()
            print(f"\n== {stage.name} ({left:.0f} s left)", flush=True)
            status = run(stage, min(stage.limit_s, left) if limited else left, log)
            statuses.set(stage.name, status, time.monotonic() - began)
            print(f"== {stage.name}: {status}", flush=True)


def run(stage: Stage, limit_s: float, log: IO[str]) -> str:
    """Runs a stage and returns how it ended."""
    process = subprocess.Popen(
        [sys.executable, *stage.command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it can be ended with all that it has started
    )
    reader = threading.Thread(target=pass_on, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        code = process.wait(limit_s)
        return "done" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "time"
    finally:
        end(process)
        reader.join(_GRACE_S)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a stage with all that it has started, whether it still runs or has left something behind."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def pass_on(lines: Iterable[str] | None, log: IO[str]) -> None:
    """Copies the lines that a stage prints to the screen and to the log."""
    for line in lines or ():
        print(line, end="", flush=True)
        log.write(line)
        log.flush()


def environment() -> dict[str, str]:
    """A stage's: the checkout comes first, installed or not; of pytest's plugins those that are asked for by name."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {**os.environ, **ours}


@contextlib.contextmanager
def ending_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the stage that runs, as Ctrl-C does, and the table is still made."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(parse()))
