"""The curves of a run: a CSV that is flushed row by row and cut back on a resume, and its picture.

It holds no times of day and no speeds, so an interrupted run writes the very bytes of an uninterrupted one.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a screen

COLUMNS = ("step", "images", "lr", "loss", "grad_norm", "held_out_loss")


class History:
    """The rows of training so far.

    Args:
        path: the CSV.
        step: rows of this step and later are dropped: they will be written again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if _whole(row) and int(row["step"]) < step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, row: Mapping[str, float]) -> None:
        """Appends a row and flushes it."""
        self.rows.append({key: "" if key not in row else f"{row[key]:.9g}" for key in COLUMNS})
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])

    def plot(self, path: Path) -> None:
        """Draws the training loss and the held-out loss over the steps, as a PNG."""
        figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
        for key, label in (("loss", "training loss"), ("held_out_loss", "held-out loss (EMA)")):
            points = [(int(row["step"]), float(row[key])) for row in self.rows if row[key]]
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key == "held_out_loss" else None)
        axes.set(xlabel="step", ylabel="simple loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.tight_layout()
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _whole(row: Mapping[str, str | None]) -> bool:
    return all(row.get(key) is not None for key in COLUMNS)  # a kill may have cut the last line
