"""The package and the examples without what Windows and macOS lack, taken away from Python on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import TINY_PRETRAIN

ROOT = Path(__file__).parents[2]

# Windows lacks all of these, and macOS some. Reader processes start anew there, and run this first part again.
TAKEN_AWAY = """
import errno, multiprocessing.context, os, shutil, signal, sys, types, warnings
sys.modules["triton"] = None  # has wheels for Linux alone
# Packages that look at the system's name come first: it stays Linux.
import accelerate, av, fcntl, matplotlib.pyplot, psutil, timm, torch, torch.utils.tensorboard, torchvision, tyro
import torch.distributed.checkpoint.state_dict
from transformers import HieraForPreTraining, ViTMAEForPreTraining, VideoMAEForPreTraining

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "SIGXFSZ"):
    delattr(signal, name)
for name in ("fork", "killpg", "getpgid", "setsid", "sched_getaffinity", "O_DIRECTORY", "getuid"):
    delattr(os, name)
contexts = multiprocessing.context._concrete_contexts
contexts.pop("fork"), contexts.pop("forkserver")
multiprocessing.set_start_method("spawn", force=True)
psutil.Process = lambda: types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=3 * 2**30))

def no_folders(path, *flags, open=os.open, **named):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return open(path, *flags, **named)

def only_writable(file, fsync=os.fsync):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    fsync(file)

def never_over(old, new, rename=os.rename, **named):
    if os.path.exists(new):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", new)
    rename(old, new, **named)

os.open, os.fsync, os.rename = no_folders, only_writable, never_over
shutil._use_fd_functions = False  # it removes folders without opening them there
# The encoding of text is another one on Windows, so a text file names its own.
ours = r"(adamae_sampler|common|training|evaluation|video_data|__main__|pretrain|finetune)\\b"
warnings.filterwarnings("error", category=EncodingWarning, module=ours)
"""


def run_without_posix(tmp_path, code):
    script = tmp_path / "script.py"
    paths = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'examples')!r}]\n"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    script.write_text(f"{paths}{TAKEN_AWAY}\nif __name__ == '__main__':\n{body}", encoding="utf-8")
    command = [sys.executable, "-X", "warn_default_encoding", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports(tmp_path):
    code = f"""
import importlib, pkgutil
from pathlib import Path
import adamae_sampler
names = [each.name for each in pkgutil.walk_packages(adamae_sampler.__path__, "adamae_sampler.")]
examples = Path({str(ROOT / "examples")!r})
names += [".".join(path.relative_to(examples).with_suffix("").parts) for path in examples.rglob("*.py")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if "is now" not in str(error):  # the old name of a module that moved
            raise
print(len(names))
"""
    assert int(run_without_posix(tmp_path, code)) > 100


@pytest.mark.slow
def test_a_pretraining_runs_and_resumes(tmp_path):
    """With a reader process, and with checkpoints over those of an earlier try."""
    run = tmp_path / "run"
    settings = [*TINY_PRETRAIN, "--data", "sprites:16", "--workers", 1, "--save-every", 1, "--output", run]
    first = [str(each) for each in [*settings, "--steps", 2]]
    code = f"""
import pretrain
pretrain.main({first})
checkpoints = {str(run / "checkpoints")!r}
open(checkpoints + "/step_00000002.set_aside", "wb").close()
pretrain.main({first} + ["--resume", checkpoints + "/step_00000001.safetensors"])
"""
    run_without_posix(tmp_path, code)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {line["memory_gib"] for line in lines} == {3.0}
    assert (run / "checkpoints" / "step_00000002.set_aside").stat().st_size  # it replaced an older one
