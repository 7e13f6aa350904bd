"""What a training run tells, passed on to the CSV, the pictures, the progress bar and W&B.

A killed process loses W&B's buffer, so a resumed run tells W&B everything again, from the CSV and the pictures; the
earlier offline folders of the run, which hold less, are then removed. So its history has no gap and no repeat.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.drawing import sample_grid
from modeling.files import cannot_write, write_atomic
from modeling.history import History
from modeling.images import image_grid, save_png
from modeling.paths import write_notes
from modeling.progress import Progress
from modeling.runs import step_of
from modeling.tracking import Tracker


class Reports:
    """A Reporter of training (see training.py).

    Args:
        folder: of the run.
        notes: of the run, see paths.read_notes; `wandb_folders` are those of its earlier processes.
        progress: the bar.
        tracker: the W&B run.
        examples: uint8 [N, C, H, W], real inputs to show.
        num_classes: of a class-conditional model, a row each in the sample grids; else 0.
    """

    def __init__(
        self,
        folder: Path,
        notes: dict[str, Any],
        progress: Progress,
        tracker: Tracker,
        examples: Tensor,
        num_classes: int = 0,
    ) -> None:
        self.folder = folder
        self.notes = notes
        self.progress = progress
        self.tracker = tracker
        self.examples = examples
        self.num_classes = num_classes
        self.values: dict[str, float] = {}

    def started(self, step: int) -> None:
        """See Reporter."""
        self.history = History(self.folder / "train.csv", step)
        for path in self._pictures():
            if step_of(path) >= step:
                path.unlink()
        self._tell_again()
        self.progress.started(step)

    def _pictures(self) -> list[Path]:
        return sorted(p for p in (self.folder / "samples").glob("step-*.png") if p.stem[5:].isdecimal())

    def _tell_again(self) -> None:
        earlier = self.notes.get("wandb_folders", [])
        if self.tracker.folder is not None:
            self._note([*earlier, str(self.tracker.folder)])
        if self.tracker.lacks(0):
            self.tracker.image("inputs", image_grid(self.examples), 0)
        pictures = {step_of(path): path for path in self._pictures()}
        for row in self.history.rows():
            if self.tracker.lacks(int(row["step"])):
                self._track(row, pictures.get(int(row["step"])))
        if self.tracker.folder is not None and self.tracker.run is not None:  # it holds all that the earlier ones do
            self.tracker.replaces(earlier)
            self._note([str(self.tracker.folder)])

    def _note(self, folders: list[str]) -> None:
        self.notes["wandb_folders"] = folders
        write_notes(self.folder, self.notes)

    def _track(self, row: dict[str, str], picture: Path | None) -> None:
        values = {key: float(value) for key, value in row.items() if value}
        step, seconds = int(values.pop("step")), values.pop("seconds")
        values["images_per_second"] = values["images"] / seconds if seconds else 0.0
        self.tracker.log({f"train/{key}": value for key, value in values.items()}, step)
        if picture is not None:
            self.tracker.picture("train/samples", picture, step)

    def stepped(self, step: int) -> None:
        """See Reporter."""
        self.progress.stepped(step)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""
        self._track(self.history.add(row | {"seconds": seconds}), None)
        self.progress.logged(step, row, seconds)
        self.values |= row | {"seconds": seconds, "images_per_second": row["images"] / seconds if seconds else 0.0}

    def sampled(self, step: int, images: Tensor) -> None:
        """See Reporter."""
        path = self.folder / "samples" / f"step-{step:09}.png"
        save_png(path, sample_grid(images, self.num_classes))
        self.tracker.picture("train/samples", path, step)

    def publish(self, target: Path, steps: int, parameters: int) -> None:
        """Writes train.csv, train.json, curves.png and samples/ into `target`.

        Raises:
            UserError: they cannot be written.
        """
        values = self.values
        report = {
            "loss": values["loss"],
            "held_out_loss": values["held_out_loss"],
            "steps": steps,
            "images": int(values["images"]),
            "parameters": parameters,
            "seconds": round(values["seconds"], 1),
            "images_per_second": round(values["images_per_second"], 1),
        }
        self.history.publish(target / "train.csv")
        write_atomic(target / "train.json", (json.dumps({"train": report}, indent=2) + "\n").encode())
        self.history.plot(target / "curves.png")
        partial = target / ".samples.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for path in self._pictures():
                shutil.copy(path, partial / path.name)
            shutil.rmtree(target / "samples", ignore_errors=True)
            partial.rename(target / "samples")
        except OSError as error:  # shutil.Error is one too
            raise cannot_write(target / "samples", error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
