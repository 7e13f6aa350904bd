"""Where coverage does not look."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def unmeasured() -> Iterator[None]:
    """Coverage's tracer, with which a call of a function takes ten times as long, is off.

    A worker of xdist has three: by the variable that processes started by tests obey, by pytest-cov, and once more by
    pytest-cov as a worker. The mark no_cover stops the last one, and then the one before it goes on.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


def import_unmeasured(*names: str) -> None:
    """Imports those of the modules that are installed."""
    with unmeasured():
        for name in filter(find_spec, names):
            importlib.import_module(name)
