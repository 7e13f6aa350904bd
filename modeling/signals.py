"""SIGTERM and SIGINT as a polite request: the step is finished and saved. A second signal ends the process at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within the context, the function that it gives says whether a stop was asked for. Main thread only."""
    requested = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise SystemExit(128 + number)
        requested = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
