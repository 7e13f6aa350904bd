"""SIGTERM and SIGINT as a request: the current work is finished or dropped, and what is done is saved.

The request is one flag of the process; loops that take long check it with `poll`. The first signal restores the default
behaviour, so a second one ends the process at once. The exception is a worker of torchrun: its agent passes signals on
a second time, and kills workers that do not end in time.
"""

import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from modeling.reliability.errors import Stopped

log = logging.getLogger(__name__)
JOB = "MODELING_JOB"  # the environment variable that names the folder which the launcher and its workers share
TORCHRUN = "TORCHELASTIC_RUN_ID"  # the one that tells torchrun's workers from those of others
STOP_FILE = "stop"  # in that folder: all workers are to stop
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish")  # between DVC and its stage
_requested = False
_at_once = False


def stop_requested() -> bool:
    """Whether a signal asked this process, its launcher, or another worker of its launcher to stop."""
    return _requested or (JOB in os.environ and Path(os.environ[JOB], STOP_FILE).exists())


def stop_workers() -> None:
    """Asks all workers of this process's launcher, if it has one, to stop."""
    if JOB in os.environ:
        Path(os.environ[JOB], STOP_FILE).touch()


def poll() -> None:
    """Raises Stopped if a stop was requested. Every loop that may take seconds calls this."""
    if stop_requested():
        raise Stopped("stopped")


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within the context, the first signal raises Stopped: for long calls of libraries, which contain no poll."""
    global _at_once
    _at_once = True
    try:
        poll()
        yield
    finally:
        _at_once = False


@contextmanager
def stop_requests() -> Iterator[None]:
    """Within the context, the first signal is a request. Main thread only."""
    global _requested

    def handler(number: int, frame: FrameType | None) -> None:
        global _requested
        again, _requested = _requested, True
        if TORCHRUN not in os.environ:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if _at_once and not again:
            raise Stopped("stopped")

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_stop_without_dvc, daemon=True).start()
    try:
        yield
    finally:
        _requested = False
        for number, previous in before.items():
            signal.signal(number, previous)


def _stop_without_dvc() -> None:
    """Asks this process to stop once DVC has ended, which leaves its stages running."""
    import psutil  # here, since only a run under DVC needs it

    with suppress(psutil.Error, StopIteration):  # in a container, a shell may be all that is above
        dvc = next(p for p in psutil.Process().parents() if p.name() not in SHELLS)
        with suppress(psutil.NoSuchProcess):
            while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        log.warning("DVC has ended: this stage stops too; if `git status` then says HEAD detached: git switch main")
        os.kill(os.getpid(), signal.SIGTERM)


def resume_command(typed: Sequence[str], resume: str = "auto") -> str:
    """The command that resumes, with `auto` in place of trainer.resume=never; only described if it was not `typed`."""
    instead = " with trainer.resume=auto" if resume == "never" else ""
    for variable, command in (("DVC_STAGE", "dvc command"), (TORCHRUN, "torchrun command"), ("MASTER_ADDR", "command")):
        if variable in os.environ:
            return f"the same {command}{instead}"
    words = [word for word in typed if not (instead and word.startswith("trainer.resume="))]
    return shlex.join(["python", *words, *instead.split()[1:]])
