"""The curves of a run: a CSV that is flushed row by row and cut back on a resume, and its picture.

The published files hold no times and no speeds, so an interrupted run publishes the same bytes as an uninterrupted one.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.reliability.files import cannot_write, replacing, write_atomic

SERIES = ("lr", "loss", "grad_norm", "held_out_loss")  # each published in a file of its own, without gaps
KEPT = ("step", "images", *SERIES, "seconds")  # of the file in the run's folder; seconds of training so far
# Names for people: with v-prediction the two are errors of different things, and their curves far apart.
LOSSES = {"loss": "training loss, of the output", "held_out_loss": "held-out loss, of the noise (EMA)"}


class Curves:
    """The rows of training in a CSV; those of `step` and later are dropped, since they will be written again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        _write(path, KEPT, (row for row in self.rows() if row["step"] < step))

    def rows(self) -> list[dict[str, float]]:
        """Those of `read_rows`."""
        return read_rows(self.path)

    def add(self, row: Mapping[str, float]) -> dict[str, float]:
        """Appends a row to the file and returns it as it can be read again; UserError if it cannot be written."""
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, KEPT).writerow(_format(row))
                file.flush()
                os.fsync(file.fileno())  # a checkpoint of a later step must not outlive the row
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return {key: float(value) for key, value in _format(row).items()}

    def publish(self, folder: Path) -> None:
        """Fills a folder with a file for each series: its steps and values."""
        rows = self.rows()
        for name in SERIES:
            _write(folder / f"{name}.csv", ("step", name), (row for row in rows if name in row))

    def plot(self, path: Path) -> None:
        """Draws the training loss and the held-out loss over the steps, as a PNG."""
        from matplotlib import ticker  # here: it takes half a second, and training needs it only at its end
        from matplotlib.figure import Figure

        rows = self.rows()
        figure = Figure(figsize=(7, 4), dpi=120)
        axes = figure.subplots()
        for key, label in LOSSES.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key == "held_out_loss" else None)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))  # curves seldom span more than a power of ten
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.tight_layout()
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": None})


def read_rows(path: Path) -> list[dict[str, float]]:
    """All complete rows of the CSV, by step; a value that was not measured at a step is not in its row."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        return [values for row in csv.DictReader(file) if (values := _parse(row)) is not None]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(map(_format, rows))
    write_atomic(path, text.getvalue().encode())


def _format(row: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.9g}" for key, value in row.items()}


def _parse(row: Mapping[str, Any]) -> dict[str, float] | None:
    """The values of a row; None if a kill has cut it or a disk damaged it."""
    try:
        values = {key: float(value) for key, value in row.items() if value != ""}
    except (TypeError, ValueError):
        return None
    if not {"step", "images", "seconds"} <= set(values) <= set(KEPT) or not all(map(math.isfinite, values.values())):
        return None
    return values if values["step"].is_integer() and values["seconds"] > 0 else None
