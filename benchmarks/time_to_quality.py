"""Quality against time: `python -m benchmarks.time_to_quality --minutes 25 --folder runs/quality experiment=paper`.

Trains for so many minutes of steps and stops as a pre-empted run does; the same command goes on from there, so a long
training can be made of parts. At every trainer.evaluate_every steps it records, with the EMA weights, the held-out loss
and bits/dim of the same test images under the same noise; at every trainer.sample_every a grid. In the folder:
quality.csv (against images seen and minutes of training, without the minutes of evaluation), quality.png, samples/.
"""

import argparse
import csv
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.machine import describe
from benchmarks.project import command_line, configure
from modeling.build import build_model
from modeling.data.prepared import LabelledImages, Prepared
from modeling.evaluation.bits_per_dim import bits_per_dim
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import sample_grid, save_png
from modeling.reliability.errors import Stopped
from modeling.reliability.files import write_atomic
from modeling.reliability.signals import stop_requests
from modeling.settings import Config
from modeling.stages.prepare import ensure_prepared
from modeling.training.optimizer import build_optimizer
from modeling.training.trainer import EVALUATION_BATCH, Reporter, Trainer

COLUMNS = ("step", "images", "minutes", "loss", "held_out_loss", "bits_per_dim", "bits_per_dim_stderr", "machine")


class Quality(Reporter):
    """Records the quality at every evaluation, and asks for a stop when the minutes of this part are over."""

    def __init__(self, folder: Path, config: Config, test: LabelledImages, compute: Compute, minutes: float) -> None:
        self.folder, self.config, self.test, self.compute = folder, config, test, compute
        self.limit = 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.loss = 0.0
        self.trainer: Trainer

    def started(self, step: int) -> None:
        """Drops what is of this step or later: it will be recorded again."""
        self.deadline = time.monotonic() + self.limit
        path = self.folder / "quality.csv"
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [dict(row) for row in csv.DictReader(file) if int(row["step"]) < step]

    def stepped(self, step: int) -> None:
        if time.monotonic() > self.deadline:
            signal.raise_signal(signal.SIGTERM)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        self.loss = row.get("loss", self.loss)
        if "held_out_loss" not in row:
            return
        start = time.monotonic()
        e, trainer = self.config.evaluation, self.trainer
        with trainer.ema.swapped_in():
            test = self.test.first(e.bpd_images)
            found = bits_per_dim(trainer.model, test, EVALUATION_BATCH, e.bpd_timesteps, self.compute)
        values = {"step": step, "images": int(row["images"]), "minutes": round(seconds / 60, 3), "loss": self.loss}
        values |= {key: found[key] for key in ("bits_per_dim", "bits_per_dim_stderr")}
        values |= {"held_out_loss": row["held_out_loss"], "machine": describe(self.compute.device)["name"]}
        self.rows.append(values)
        lines = [",".join(COLUMNS), *(",".join(str(r[key]) for key in COLUMNS) for r in self.rows)]
        write_atomic(self.folder / "quality.csv", ("\n".join(lines) + "\n").encode())
        self.deadline += time.monotonic() - start
        print(*(f"{key} {values[key]:.5g}" for key in COLUMNS[:-1]), flush=True)

    def sampled(self, step: int, images: Tensor) -> None:
        save_png(self.folder / "samples" / f"step-{step:09}.png", sample_grid(images, 0))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss and bits/dim, against images seen and against minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for line, (key, label) in zip(
        grid, (("held_out_loss", "held-out loss"), ("bits_per_dim", "bits/dim")), strict=True
    ):
        for axes, x, unit in zip(line, ("images", "minutes"), ("images seen", "minutes of training"), strict=True):
            axes.plot([float(row[x]) for row in rows], [float(row[key]) for row in rows], marker=".")
            axes.set(xlabel=unit, ylabel=label, yscale="log")
            axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(minutes: float, folder: Path, overrides: list[str]) -> bool:
    """One part. Returns whether all of trainer.steps are done."""
    config = configure(*overrides)
    compute = choose_compute(config.device, config.precision, config.deterministic)
    source = ensure_prepared(config, config.data)
    meta = Prepared(source)
    model = build_model(config.model, config.diffusion, meta["shape"], len(meta["classes"]), config.seed)
    model = compute.place_model(model)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    train, test = Prepared(source, "train"), Prepared(source, "test")
    quality = Quality(folder, config, test, compute, minutes)
    optimizer = build_optimizer(config.optimizer, model.parameters())
    settings = (config.optimizer, config.trainer, config.seed)
    quality.trainer = Trainer(model, optimizer, *settings, train, test, compute, folder, quality)
    done = True
    try:
        with stop_requests():
            quality.trainer.run()
    except Stopped as stopped:
        done = False
        print(f"{stopped}: the same command goes on", flush=True)
    if quality.rows:
        plot(quality.rows, folder / "quality.png")
    return done


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of training in this part")
    parser.add_argument("--folder", type=Path, required=True, help="of the state; one a recipe")
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    arguments = parser.parse_args()
    run(arguments.minutes, arguments.folder, arguments.overrides)


if __name__ == "__main__":
    command_line(main)
