"""The command line of the studies: options, overrides of the configuration, one line for bad input, and the results."""

import argparse
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from modeling.reliability.errors import ConfigError, UserError

Found = dict[str, Any]


as_json = partial(json.dumps, indent=2)


def run_study(
    measure: Callable[..., Found],
    plot: Callable[[Found, Path], None] | None = None,
    text: Callable[[Found], str] = as_json,
    out: Path | None = None,
    arguments: Sequence[str] | None = None,
    **options: Any,
) -> Found:
    """Parses the command line, measures, prints the results as `text` and returns them; bad input is one line.

    Args:
        measure: called with the list of overrides and the options.
        out: the default of --out, the path without ending of the JSON and the PNG of `plot`; None: no files.
        options: of the command line: a default, or the type of one that must be given.
    """
    about = inspect.getdoc(inspect.getmodule(measure))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        if isinstance(default, type):
            parser.add_argument(f"--{name}", type=default, required=True)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=out, help="of the results, without ending")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=small or out_dir=.")
    given = vars(parser.parse_args(arguments))
    target = given.pop("out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        found = {"overrides": given["overrides"]} | measure(**given)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code if isinstance(error, UserError) else ConfigError.exit_code) from None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".json").write_text(as_json(found) + "\n")
        if plot is not None:
            plot(found, target.with_suffix(".png"))
    print(text(found))
    return found


@contextmanager
def figure(path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """A figure of that many inches that is saved at the end; yields its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    yield axes
    drawn.savefig(path, dpi=120)
    plt.close(drawn)
