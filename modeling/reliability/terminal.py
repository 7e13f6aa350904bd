"""What people see while a command runs: short log lines, and how far long work has come.

In a terminal progress is a live bar on standard error; elsewhere it is a log line every half minute.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Part = TypeVar("Part")
LINE_EVERY = 30.0  # seconds between lines where there is no terminal, and between values in a bar
NAMED = 12  # things of a kind that a line names
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"
LOCK = threading.RLock()
_open: list["Bar"] = []  # the innermost is the last


def bars() -> Any:
    """tqdm, with a lock of this process: its own is for several, and a process that is killed would leave it behind."""
    from tqdm import tqdm  # here, since a command without progress, such as --help, need not wait for it

    tqdm.set_lock(LOCK)
    return tqdm


def keep_streams() -> None:
    """Opens the standard streams that the caller has closed: else the next file to be opened would be one of them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # until the process ends
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115  # likewise


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]  # generic for type checkers only
    """Log lines of time and message; a live bar goes on below them."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        with bars().external_write_mode(self.stream) if "tqdm" in sys.modules else nullcontext():
            super().emit(record)


def shorten_log() -> None:
    """Has the root logger print _Lines in place of Hydra's, and of other libraries warnings only.

    Hydra's log file keeps its long form.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            root.addHandler(_Lines(handler.stream))
    if root.level == logging.INFO:  # not under hydra.verbose
        root.setLevel(logging.WARNING)
        logging.getLogger("modeling").setLevel(logging.INFO)


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h' or '20 days'."""
    for limit, size, text in ((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min"), (172800, 3600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / size)
    return f"{seconds / 86400:.0f} days"


def counts(found: Mapping[str, int]) -> str:
    """'30 .heic, 2 .txt': how often there is what, the most frequent first, and at most NAMED of them."""
    shown = [f"{n:,} {what}" for what, n in sorted(found.items(), key=lambda item: -item[1])]
    more = [f"{len(shown) - NAMED} more"] if len(shown) > NAMED else []
    return ", ".join(shown[:NAMED] + more)


class Bar:
    """How far some work has come: `done` of `total` units; what is done at first was done before this process."""

    def __init__(self, what: str, total: float, unit: str = "images", done: float = 0, **options: Any) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.values = ""
        self.shown_at = time.perf_counter()
        self.mark: tuple[float, float] | None = None  # what was done when, after the first part
        # None: unless there is no terminal. Of several processes the first one talks.
        quiet = True if os.environ.get("RANK", "0") != "0" else None
        options |= {"dynamic_ncols": True, "mininterval": 0.5, "smoothing": 0.02, "bar_format": BAR, "disable": quiet}
        self.tqdm = bars()(total=total, initial=done, desc=what, unit=unit, **options)

    @property
    def live(self) -> bool:
        """Whether it is a bar in a terminal."""
        return not self.tqdm.disable

    def to(self, done: float, values: Callable[[], str] | None = None) -> None:
        """So much is done by now. `values`, if any, are asked for when they are shown."""
        self.tqdm.update(done - self.done)
        self.done = done
        if self.mark is None:
            self.mark = done, time.perf_counter()
        if self.due():
            self.show(values() if values else self.values)

    def advance(self, more: float) -> None:
        """So much more is done."""
        self.to(self.done + more)

    def due(self) -> bool:
        """Whether half a minute has passed since something was shown."""
        return time.perf_counter() - self.shown_at > LINE_EVERY

    def show(self, values: str) -> None:
        """Shows values beside the progress: in the bar, or as a line."""
        self.values, self.shown_at = values, time.perf_counter()
        self.tqdm.set_postfix_str(values)
        if not self.live:
            shown = [f"{self.done:.0f}/{self.total:.0f} {self.unit}", *filter(None, [values])]
            if self.rate() and self.done < self.total:
                shown.append(f"{duration((self.total - self.done) / self.rate())} left")
            log.info("%s: %s", self.what, ", ".join(shown))

    def rate(self) -> float:
        """Units a second in this process without its first part, which is slow; 0 before the second."""
        done, since = self.mark or (self.done, 0.0)
        return (self.done - done) / max(time.perf_counter() - since, 1e-9)

    def close(self) -> None:
        self.tqdm.close()


@contextmanager
def progress(what: str, total: float, unit: str = "images", done: float = 0) -> Iterator[Bar]:
    """Within the context, the progress of some work; of the whole, if it is part of work of the same name."""
    if _open and _open[-1].what == what:
        yield _open[-1]
        return
    # Work of less than a second shows nothing.
    _open.append(Bar(what, total, unit, done, leave=False, delay=1.0))
    try:
        yield _open[-1]
    finally:
        _open.pop().close()


def counted(what: str, parts: Sequence[Part], unit: str) -> Iterator[Part]:
    """The parts of some work, one after another, with its progress."""
    with progress(what, len(parts), unit) as shown:
        for part in parts:
            yield part
            shown.advance(1)
