"""Tools on the command line that are no stages: python -m modeling.commands.<name> --help."""

import os
import sys
from collections.abc import Callable, Sequence

from modeling.reliability.errors import UserError


def call(run: Callable[[Sequence[str]], None]) -> None:
    """Runs a tool with what was typed; an error for the user is one line and its exit code."""
    os.environ["MPLBACKEND"] = "agg"  # as in main.py
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
