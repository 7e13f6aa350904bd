"""Where coverage does not look."""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


@contextmanager
def unmeasured() -> Iterator[None]:
    """Coverage's tracer, with which a call of a function takes ten times as long, is off.

    A worker of xdist has three: by the variable that processes started by tests obey, by pytest-cov, and once more by
    pytest-cov as a worker. The mark no_cover stops the last one, and then the one before it goes on.
    """
    tracer: Any = sys.gettrace()
    stop = getattr(tracer, "stop", None)  # coverage's; sys.settrace(None) would mix up its stack of frames
    if stop:
        stop()
    try:
        yield
    finally:
        if stop:
            tracer.start()


def import_unmeasured(*names: str) -> None:
    """Imports those of the modules that are installed."""
    with unmeasured():
        for name in filter(find_spec, names):
            importlib.import_module(name)


def leave_out_what_is_not_ours() -> None:
    """From now on coverage is off in calls of other packages that take long; none of them calls anything of ours."""
    for path in (
        "hydra._internal.hydra.Hydra.compose_config",
        "hydra.core.override_parser.overrides_parser.OverridesParser.parse_overrides",
        "matplotlib.figure.Figure.savefig",
        "torch.load",
        "torch.save",
        "wandb.init",
    ):
        owner, _, name = path.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        setattr(owner, name, _left_out(getattr(owner, name)))


def _left_out(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def left_out(*arguments: Any, **options: Any) -> Any:
        with unmeasured():
            return function(*arguments, **options)

    return left_out
