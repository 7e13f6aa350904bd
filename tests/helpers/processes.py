"""Real processes of main.py that start fast: a server that has imported everything forks them.

Their lines are measured where those of the test are: not in tests with the mark no_cover. A process writes the
functions on its stack to a file at every SIGUSR1, so a test knows where it was when it was killed.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import time
import traceback
from multiprocessing import forkserver
from unittest import mock

import coverage
import psutil
import torch

from helpers.measuring import leave_out_what_is_not_ours
from helpers.pipeline import ROOT, measured

CONTEXT = multiprocessing.get_context("forkserver")
# All that a process of main.py imports, and what W&B imports as late as in its init.
PRELOAD = ["modeling.stages.train", "modeling.stages.evaluate", "hydra.main", "matplotlib.pyplot", "wandb"]
PRELOAD += ["wandb.sdk.launch.inputs.internal", "torch._dynamo"]
CONTEXT.set_forkserver_preload(["helpers.processes", *PRELOAD])


def _child(arguments, cwd, environment, log, stacks, limits):
    os.chdir(cwd)
    os.environ.pop("WANDB_SERVICE", None)  # of the tests: a process that is killed takes its own service along
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if coverage.process_startup():  # the environment asks for it
        leave_out_what_is_not_ours()
    descriptor = os.open(stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # unbuffered: signals may come within signals

    def write_stack(number, frame):
        names = [each.f_code.co_name for each, _ in traceback.walk_stack(frame)]
        os.write(descriptor, (" ".join(names) + "\n").encode())

    signal.signal(signal.SIGUSR1, write_stack)
    os.write(descriptor, b"ready\n")
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, resource.RLIM_INFINITY))
    # The server has imported PyTorch already, so the variable alone would come too late.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(ROOT / "main.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:  # the coverage is still to be written
        for name in limits:
            resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


_started = []


def _start_server():
    """Without measuring, which would make its imports and all its children slow: each of them measures itself."""
    with mock.patch.dict(os.environ):
        for name in measured():
            del os.environ[name]
        forkserver.ensure_running()


def end_all():
    """Kills every process that still runs."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


class Launched:
    """A process of main.py with its log and its stacks in `folder`; limits by their names in `resource`."""

    def __init__(self, folder, arguments, cwd, environment, limits=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.stacks = folder / "log", folder / "stacks"
        self.log.write_text("")
        self.stacks.unlink(missing_ok=True)
        settings = {"DVC_ROOT": str(folder / "root"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | environment
        if sys.gettrace():
            settings |= measured()
        _start_server()
        given = (list(arguments), cwd, settings, self.log, self.stacks, limits or {})
        self.process = CONTEXT.Process(target=_child, args=given, daemon=True)  # ends with the tests
        self.process.start()
        _started.append(self.process)
        self.wait_for(lambda: self.stacks.exists() and self.stacks.stat().st_size)

    def wait_for(self, condition, seconds=60.0):
        """Waits until a condition holds; whether it did before the process ended."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, self.printed()
            time.sleep(0.002)
        return True

    def stack(self):
        """The names of the functions on its stack now."""
        before = self.stacks.stat().st_size
        self.send_signal(signal.SIGUSR1)
        self.wait_for(lambda: self.stacks.stat().st_size > before)
        return self.stacks.read_text()[before:].split()

    def wait_until_in(self, function):
        """Waits until a function is on the stack; whether that came before the end."""
        return self.wait_for(lambda: function in self.stack())

    def workers(self):
        """If it is a launcher: its workers by rank, which it has forked in this order."""
        return sorted(psutil.Process(self.process.pid).children(), key=lambda worker: worker.pid)

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self, seconds=120.0):
        """Waits for the end and gives the exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.printed()
        return self.process.exitcode

    def printed(self):
        return self.log.read_text()

    def last_line(self):
        """The only line that it printed beside log lines."""
        logged = re.compile(r"\d\d:\d\d:\d\d |\[20")  # of this project, and of Hydra's sweeps
        (line,) = (line for line in self.printed().splitlines() if line and not logged.match(line))
        return line
