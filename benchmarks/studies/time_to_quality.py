"""Quality against time: `python -m benchmarks.studies.time_to_quality --minutes 25 --folder runs/quality [overrides]`.

Trains for so many minutes of steps and stops as a pre-empted run does; the same command goes on from there, so a long
training can be made of parts. At every trainer.evaluate_every steps it records, with the EMA weights, the held-out loss
and bits/dim of the same test images under the same noise; at every trainer.sample_every a grid. In the folder, one a
recipe: quality.csv (against images seen and minutes of training, without the minutes of evaluation), quality.png,
samples/.
"""

import csv
import io
import logging
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.command import figure, run_study
from benchmarks.machine import describe
from benchmarks.project import configure, trainer_on
from modeling.data.prepared import LabelledImages, ensure_prepared
from modeling.evaluation.bits_per_dim import bits_per_dim
from modeling.inference.images import sample_grid, save_png
from modeling.reliability.errors import Stopped
from modeling.reliability.files import write_atomic
from modeling.reliability.signals import stop_requests
from modeling.settings.groups import EvaluationConfig
from modeling.training.trainer import Reporter, Trainer

COLUMNS = ("step", "images", "minutes", "loss", "held_out_loss", "bits_per_dim", "bits_per_dim_stderr", "machine")


class Quality(Reporter):
    """Records the quality at every evaluation, and asks for a stop when the minutes of this part are over."""

    trainer: Trainer

    def __init__(self, folder: Path, evaluation: EvaluationConfig, test: LabelledImages, minutes: float) -> None:
        self.folder, self.evaluation, self.test, self.minutes = folder, evaluation, test, minutes
        self.path = folder / "quality.csv"
        self.rows: list[dict[str, Any]] = []
        self.loss = 0.0

    def started(self, step: int) -> None:
        """Drops the rows of this step or later, which will be recorded again."""
        self.deadline = time.monotonic() + 60 * self.minutes
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]

    def stepped(self, step: int, loss: Callable[[], float]) -> None:
        """See Reporter."""
        if time.monotonic() > self.deadline:
            signal.raise_signal(signal.SIGTERM)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""
        self.loss = row.get("loss", self.loss)
        if "held_out_loss" not in row:
            return
        start = time.monotonic()
        e, compute = self.evaluation, self.trainer.compute
        test = self.test.first(e.bpd_images)
        found = bits_per_dim(self.trainer.ema.model, test, e.batch_size, e.bpd_timesteps, compute)
        values = row | found | {"minutes": round(seconds / 60, 3), "loss": self.loss}
        values["machine"] = describe(compute.device)["name"]
        self.rows.append({key: values[key] for key in COLUMNS})
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.path, text.getvalue().encode())
        logging.info("%s", self.rows[-1])
        self.deadline += time.monotonic() - start

    def sampled(self, step: int, images: Tensor) -> None:
        """See Reporter."""
        save_png(self.folder / "samples" / f"step-{step:09}.png", sample_grid(images, 0))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss and bits/dim, against images seen and against minutes."""
    with figure(path, 9, 6, rows=2, columns=2) as grid:
        for axes, y, x in zip(
            grid.flat, ("held_out_loss",) * 2 + ("bits_per_dim",) * 2, ("images", "minutes") * 2, strict=True
        ):
            axes.plot([float(row[x]) for row in rows], [float(row[y]) for row in rows], marker=".")
            axes.set(xlabel=x, ylabel=y, yscale="log")
            axes.grid(alpha=0.3, which="both")


def measure(overrides: list[str], minutes: float, folder: Path) -> dict[str, Any]:
    """Trains one part; `done` says whether all of trainer.steps are."""
    config = configure(*overrides)
    data = ensure_prepared(config, config.data)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    quality = Quality(folder, config.evaluation, data.test, minutes)
    quality.trainer = trainer_on(config, data, folder, quality)
    done = True
    try:
        with stop_requests():
            quality.trainer.run()
    except Stopped as stopped:
        done = False
        logging.info("%s: the same command goes on", stopped)
    if quality.rows:
        plot(quality.rows, folder / "quality.png")
    return {"done": done, "steps": quality.trainer.step, "newest": quality.rows[-1:]}


main = partial(run_study, measure, minutes=float, folder=Path)

if __name__ == "__main__":
    main()
