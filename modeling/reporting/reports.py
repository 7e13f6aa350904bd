"""The trainer's callbacks: pass everything on to the curves, the sample grids, the progress bar and W&B.

A killed process loses W&B's buffer, so a resumed run logs everything to W&B again, from the CSV and the pictures; the
earlier offline folders of the run, which hold less, are then removed. So its curves have no gap and no repeat.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.checkpoints.checkpoint import step_of
from modeling.checkpoints.run_folder import Run, write_notes
from modeling.inference.images import image_grid, sample_grid, save_png
from modeling.reliability.files import replacing_folder, write_atomic
from modeling.reporting.curves import Curves
from modeling.reporting.progress import Progress
from modeling.reporting.wandb_run import WandbRun
from modeling.training.trainer import Reporter


class Reports(Reporter):
    """What the trainer reports, passed on.

    Args:
        run: whose `folder` and `notes` are used; `wandb_folders` in the notes are those of its earlier processes.
        examples: uint8 [N, C, H, W], real inputs to show.
        num_classes: of a class-conditional model, which get a row each in the sample grids; else 0.
    """

    def __init__(self, run: Run, progress: Progress, wandb_run: WandbRun, examples: Tensor, num_classes: int) -> None:
        self.run = run
        self.progress = progress
        self.wandb_run = wandb_run
        self.examples = examples
        self.num_classes = num_classes
        self.values: dict[str, float] = {}

    def started(self, step: int) -> None:
        """See Reporter."""
        self.curves = Curves(self.run.folder / "train.csv", step)
        for path in self._pictures():
            if step_of(path) >= step:
                path.unlink()
        self._log_again()
        self.progress.started(step)

    def _pictures(self) -> list[Path]:
        return sorted(p for p in (self.run.folder / "samples").glob("step-*.png") if p.stem[5:].isdecimal())

    def _log_again(self) -> None:
        w = self.wandb_run
        earlier = self.run.notes.get("wandb_folders", [])
        if w.folder is not None:
            self._note_wandb_folders([*earlier, str(w.folder)])
        if w.lacks(0):
            w.image("inputs", image_grid(self.examples), 0)
        pictures = {step_of(path): path for path in self._pictures()}
        for row in self.curves.rows():
            if w.lacks(int(row["step"])):
                self._log(row, pictures.get(int(row["step"])))
        if w.folder is not None and w.run is not None:  # it holds all that the earlier ones do
            w.replaces(earlier)
            self._note_wandb_folders([str(w.folder)])

    def _note_wandb_folders(self, folders: list[str]) -> None:
        self.run.notes["wandb_folders"] = folders
        write_notes(self.run.folder, self.run.notes)

    def _log(self, row: dict[str, str], picture: Path | None) -> None:
        values = {key: float(value) for key, value in row.items() if value}
        step, seconds = int(values.pop("step")), values.pop("seconds")
        values["images_per_second"] = values["images"] / seconds if seconds else 0.0
        self.wandb_run.log({f"train/{key}": value for key, value in values.items()}, step)
        if picture is not None:
            self.wandb_run.picture("train/samples", picture, step)

    def stepped(self, step: int) -> None:
        """See Reporter."""
        self.progress.stepped(step)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""
        self._log(self.curves.add(row | {"seconds": seconds}), None)
        self.progress.logged(step, row, seconds)
        self.values |= row | {"seconds": seconds, "images_per_second": row["images"] / seconds if seconds else 0.0}

    def sampled(self, step: int, images: Tensor) -> None:
        """See Reporter."""
        path = self.run.folder / "samples" / f"step-{step:09}.png"
        save_png(path, sample_grid(images, self.num_classes))
        self.wandb_run.picture("train/samples", path, step)

    def publish(self, target: Path, parameters: int) -> None:
        """Writes train.csv, train.json, curves.png and samples/ into `target`, else raises UserError."""
        values = self.values
        report: dict[str, Any] = {
            "loss": values["loss"],
            "held_out_loss": values["held_out_loss"],
            "steps": int(values["step"]),
            "images": int(values["images"]),
            "parameters": parameters,
            "seconds": round(values["seconds"], 1),
            "images_per_second": round(values["images_per_second"], 1),
        }
        self.curves.publish(target / "train.csv")
        write_atomic(target / "train.json", (json.dumps({"train": report}, indent=2) + "\n").encode())
        self.curves.plot(target / "curves.png")
        with replacing_folder(target / "samples") as partial:
            for path in self._pictures():
                shutil.copy(path, partial / path.name)
