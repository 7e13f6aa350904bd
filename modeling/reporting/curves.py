"""The curves of a run: a CSV that is flushed row by row and cut back on a resume, and its picture.

The published files hold no times and no speeds, so an interrupted run publishes the same bytes as an uninterrupted one.
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from modeling.reliability.files import cannot_write, replacing, write_atomic

COLUMNS = ("step", "images", "lr", "loss", "grad_norm", "held_out_loss")  # of the published file
KEPT = (*COLUMNS, "seconds")  # of the file in the run's folder; seconds of training so far


class Curves:
    """The rows of training so far, on disk: memory does not grow with them.

    Args:
        path: the CSV.
        step: rows of this step and later are dropped: they will be written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in self.rows() if int(row["step"]) < step]
        write_atomic(path, _text(KEPT, kept).encode())

    def rows(self) -> list[dict[str, str]]:
        """All rows, by step; without those that a kill has cut short."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", errors="replace") as file:
            return [row for row in csv.DictReader(file) if _whole(row)]

    def add(self, row: Mapping[str, float]) -> dict[str, str]:
        """Appends a row, with nine digits a value, to the disk and returns it; UserError if it cannot be written."""
        added = {key: "" if key not in row else f"{row[key]:.9g}" for key in KEPT}
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, KEPT).writerow(added)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint of a later step must not outlive the row
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return added

    def publish(self, path: Path) -> None:
        """Writes the rows without their times."""
        write_atomic(path, _text(COLUMNS, self.rows()).encode())

    def plot(self, path: Path) -> None:
        """Draws the training loss and the held-out loss over the steps, as a PNG."""
        import matplotlib  # here, since it takes half a second and training needs it only at its end

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt  # after the choice of a backend without a screen
        from matplotlib import ticker

        rows = self.rows()
        figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
        for key, label in (("loss", "training loss"), ("held_out_loss", "held-out loss (EMA)")):
            points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key == "held_out_loss" else None)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))  # curves seldom span more than a power of ten
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.tight_layout()
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": None})
        plt.close(figure)


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _whole(row: Mapping[str, str | None]) -> bool:
    """Whether a row is complete and finite: a kill may cut a line, and a disk may damage one."""
    if set(row) != set(KEPT) or not str(row["step"]).isdecimal() or not row["images"] or not row["seconds"]:
        return False
    with suppress(ValueError):
        return all(math.isfinite(float(str(value))) for value in row.values() if value != "")
    return False
