"""SIGTERM and SIGINT as a polite request: the work in hand is finished or dropped, and what is done is saved.

The request is one flag of the process, as signals are; loops that take long look at it with `poll`. The first signal
gives the default behaviour back, so a second one ends the process at once, whatever it is waiting for.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from modeling.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_requested = False


def stop_requested() -> bool:
    """Whether a signal asked for a stop."""
    return _requested


def poll() -> None:
    """Raises Stopped if a signal asked for it: called in every loop that may take seconds."""
    if _requested:
        raise Stopped("stopped")


@contextmanager
def stop_requests() -> Iterator[None]:
    """Within the context, the first signal is a request. Main thread only."""
    global _requested

    def handler(number: int, frame: FrameType | None) -> None:
        global _requested
        _requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        _requested = False
        for number, previous in before.items():
            signal.signal(number, previous)


def command_again() -> str:
    """The command that goes on, for people: what was typed, or DVC's if DVC runs this process."""
    if "DVC_STAGE" in os.environ:
        return "the same dvc command"
    return shlex.join(["python", *sys.argv])
