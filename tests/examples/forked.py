"""Processes of the scripts that start in no time: forked from a server that has imported torch and timm once.

A script spends seven seconds on imports. A process from here skips them, and is like one of the command line otherwise.
Windows has no such server: there each process starts anew.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_SERVER = multiprocessing.get_context(START_METHOD)


class Started:
    """A process that runs a script; its methods are those of `subprocess.Popen` that tests use.

    Args:
        script: a file of Python.
        arguments: of the script.
        environment: variables besides the inherited ones.
    """

    def __init__(self, script, *arguments, environment=()):
        self.args = [str(script), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        told = {**os.environ, **dict(environment)}
        self._process = _SERVER.Process(target=_run, args=(self.args, told, os.getcwd(), self._folder.name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=300):
        """What it wrote to stdout and to stderr, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{self.args} took over {timeout} s and said {self._said()}")
        return self._said()

    def _said(self):
        return tuple(Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))


def _run(command, environment, folder, output):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # its own processes start as anywhere, and not by a server
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run_group(number, script, *arguments, environment=(), timeout=300):
    """Runs a script to its end in a group of processes, with the variables that torchrun sets.

    When one process fails, the others are killed, since they would wait for it. The exit code is that of the failure.
    """
    torchrun = {
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    ranks = [{}] if number == 1 else [{**torchrun, "RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
    texts = [{name: str(each) for name, each in rank.items()} for rank in ranks]
    group = [Started(script, *arguments, environment={**dict(environment), **each}) for each in texts]
    until = time.monotonic() + timeout
    while any(each.poll() is None for each in group) and not any(each.poll() for each in group):
        assert time.monotonic() < until, group[0].communicate(0)
        time.sleep(0.02)
    code = next((each.returncode for each in group if each.returncode), 0)
    for each in group:
        if each.poll() is None:
            each.kill()
    said = zip(*(each.communicate() for each in group), strict=True)
    return subprocess.CompletedProcess(group[0].args, code, *map("".join, said))


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
