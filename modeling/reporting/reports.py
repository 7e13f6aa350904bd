"""The trainer's callbacks: pass everything on to the curves, the sample grids, the progress bar and W&B.

A killed process loses W&B's buffer, so a resumed run logs everything to W&B again, from the CSV and the pictures: its
curves have no gap and no repeat.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.checkpoints.checkpoint import step_of
from modeling.checkpoints.run_folder import Run
from modeling.inference.images import cut_grid, image_grid, sample_grid, save_png
from modeling.reliability.files import replacing_folder, write_json
from modeling.reporting.curves import Curves
from modeling.reporting.experiments import Told, picture_of
from modeling.reporting.pictures import save_picture
from modeling.reporting.progress import Progress
from modeling.reporting.wandb_run import WandbRun
from modeling.training.trainer import Reporter

FILM = (8, 8)  # samples in the film strip, and steps


class Reports(Reporter):
    """What the trainer reports, passed on; curves and pictures are kept in the run's folder.

    `examples`, uint8 [N, C, H, W], are real inputs to show; each of `classes`, those of a class-conditional model, gets
    a row in the sample grids.
    """

    def __init__(
        self, run: Run, progress: Progress, wandb_run: WandbRun, examples: Tensor, classes: Sequence[str]
    ) -> None:
        self.folder = run.folder
        self.progress = progress
        self.told = Told(run.folder, wandb_run)
        self.examples = examples
        self.classes = classes
        self.last: dict[str, float] = {}

    def started(self, step: int) -> None:
        self.curves = Curves(self.folder / "train.csv", step)
        for path in self._pictures():
            if step_of(path) >= step:
                path.unlink()
        save_png(self.folder / "inputs.png", image_grid(self.examples))
        self.told.again()
        self.progress.started(step)

    def _pictures(self) -> list[Path]:
        return sorted((self.folder / "samples").glob(f"step-{9 * '[0-9]'}.png"))

    def stepped(self, step: int, loss: Callable[[], float]) -> None:
        self.progress.stepped(step, loss)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        self.last = row | {"seconds": seconds}
        self.told.row(self.curves.add(self.last))
        self.progress.logged(step, row)

    def sampled(self, step: int, images: Tensor) -> None:
        save_png(picture_of(self.folder, step), sample_grid(images, len(self.classes)))
        self.told.picture(step)

    def publish(self, target: Path, about: Mapping[str, Any]) -> None:
        """Writes metrics, details (`about` among them), curves and pictures into `target`, else raises UserError."""
        last = self.last
        metrics: dict[str, Any] = {
            "images": int(last["images"]),
            "images_per_second": round(last["images"] / last["seconds"], 1),
        }
        details = {
            "steps": int(last["step"]),
            "loss": last["loss"],
            "held_out_loss": last["held_out_loss"],
            "seconds": round(last["seconds"], 1),
        }
        write_json(target / "train.json", metrics)
        write_json(target / "train-details.json", {**metrics, **details, **about})
        with replacing_folder(target / "curves") as partial:
            self.curves.publish(partial)
        self.curves.plot(target / "curves.png")
        with replacing_folder(target / "samples") as partial:
            for path in self._pictures():
                shutil.copy(path, partial / path.name)
        self._save_film(target / "film.png")

    def _save_film(self, path: Path) -> None:
        """The same few samples, from the same noise, at steps from the first grid to the last."""
        found = self._pictures()
        last = len(found) - 1
        shown = [found[k] for k in sorted({round(k * last / (FILM[1] - 1)) for k in range(FILM[1])})]
        height, width = self.examples.shape[2:]
        grids = [cut_grid(each, height, width) for each in shown]
        # A grid has a row for each class, or is filled row by row.
        columns = [grid[:, 0] if self.classes else _filled(grid.flatten(0, 1))[: FILM[0]] for grid in grids]
        rows = [list(row) for row in zip(*columns, strict=False)]  # trainer.sample_images may have been another
        steps = [f"step {step_of(each):,}" for each in shown]
        caption = "Samples from the same noise during training (EMA weights)"
        save_picture(path, rows, caption, self.classes[: len(rows)], steps)


def _filled(tiles: Tensor) -> Tensor:
    """The tiles of a grid, uint8 [N, C, H, W], without the places at its end that no image has filled: all white."""
    count = len(tiles)
    while count > 1 and bool((tiles[count - 1] == 255).all()):
        count -= 1
    return tiles[:count]
