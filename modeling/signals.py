"""SIGTERM and SIGINT as a polite request: the work in hand is finished or dropped, and what is done is saved.

The request is one flag of the process, as signals are; loops that take long look at it with `poll`. The first signal
gives the default behaviour back, so a second one ends the process at once, whatever it is waiting for; but not one of
torchrun's processes, which the second one reaches by its agent.
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from modeling.errors import Stopped

STOP_FILE = "stop"  # in the folder that a job's processes share: asks all of them
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_requested = False
_at_once = False
_asked_elsewhere: Callable[[], bool] | None = None


def stop_requested() -> bool:
    """Whether a signal asked for a stop, this process or another one of its job."""
    return _requested or (_asked_elsewhere is not None and _asked_elsewhere())


def poll() -> None:
    """Raises Stopped if a stop was asked for: called in every loop that may take seconds."""
    if stop_requested():
        raise Stopped("stopped")


@contextmanager
def also_ask(elsewhere: Callable[[], bool]) -> Iterator[None]:
    """Within the context, requests to other processes count too."""
    global _asked_elsewhere
    _asked_elsewhere = elsewhere
    try:
        yield
    finally:
        _asked_elsewhere = None


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within the context, the first signal raises Stopped: for what takes long, without a loop of ours."""
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
        # torchrun passes on what its processes may have had already, and kills who does not end in time.
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if _at_once and not again:
            raise Stopped("stopped")

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        _requested = False
        for number, previous in before.items():
            signal.signal(number, previous)


def command_again(typed: Sequence[str] | None = None, resume: str = "auto") -> str:
    """The command that goes on, for people.

    Args:
        typed: a Python file and its arguments, unless they are still in sys.argv. Whoever has not started it himself
            has typed something else, which DVC or torchrun knows.
        resume: trainer.resume, once there is something to resume; `never` would begin at step 0 once more.
    """
    instead = " with trainer.resume=auto" if resume == "never" else ""
    if "DVC_STAGE" in os.environ:
        return "the same dvc command" + instead
    if "MASTER_ADDR" in os.environ:
        return "the same torchrun command" + instead
    words = [word for word in typed or sys.argv if not (instead and word.startswith("trainer.resume="))]
    return shlex.join(["python", *words, *instead.split()[1:]])
