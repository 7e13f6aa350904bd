"""The trainer's callbacks: pass everything on to the curves, the sample grids, the progress bar and W&B.

A killed process loses W&B's buffer, so a resumed run logs everything to W&B again, from the CSV and the pictures: its
curves have no gap and no repeat.
"""

import json
import shutil
from pathlib import Path

from torch import Tensor

from modeling.checkpoints.checkpoint import step_of
from modeling.checkpoints.run_folder import Run
from modeling.inference.images import image_grid, sample_grid, save_png
from modeling.reliability.files import replacing_folder, write_atomic
from modeling.reporting.curves import Curves
from modeling.reporting.experiments import Told, picture_of
from modeling.reporting.progress import Progress
from modeling.reporting.wandb_run import WandbRun
from modeling.training.trainer import Reporter


class Reports(Reporter):
    """What the trainer reports, passed on; curves and pictures are kept in the run's folder.

    `examples`, uint8 [N, C, H, W], are real inputs to show; each of `num_classes` gets a row in the sample grids.
    """

    def __init__(self, run: Run, progress: Progress, wandb_run: WandbRun, examples: Tensor, num_classes: int) -> None:
        self.folder = run.folder
        self.progress = progress
        self.told = Told(run.folder, wandb_run)
        self.examples = examples
        self.num_classes = num_classes
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

    def stepped(self, step: int) -> None:
        self.progress.stepped(step)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        self.last = row | {"seconds": seconds}
        self.told.row(self.curves.add(self.last))
        self.progress.logged(step, row, seconds)

    def sampled(self, step: int, images: Tensor) -> None:
        save_png(picture_of(self.folder, step), sample_grid(images, self.num_classes))
        self.told.picture(step)

    def publish(self, target: Path, parameters: int) -> None:
        """Writes train.csv, train.json, curves.png and samples/ into `target`, else raises UserError."""
        last = self.last
        report = {
            "loss": last["loss"],
            "held_out_loss": last["held_out_loss"],
            "steps": int(last["step"]),
            "images": int(last["images"]),
            "parameters": parameters,
            "seconds": round(last["seconds"], 1),
            "images_per_second": round(last["images"] / last["seconds"], 1),
        }
        self.curves.publish(target / "train.csv")
        write_atomic(target / "train.json", (json.dumps({"train": report}, indent=2) + "\n").encode())
        self.curves.plot(target / "curves.png")
        with replacing_folder(target / "samples") as partial:
            for path in self._pictures():
                shutil.copy(path, partial / path.name)
