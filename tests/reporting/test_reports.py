"""What the trainer reports reaches the files, the progress and W&B; again on a resume."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.training import trainer_config
from PIL import Image

from modeling.checkpoints.run_folder import write_notes
from modeling.reporting.progress import Progress
from modeling.reporting.reports import Reports
from modeling.reporting.wandb_run import WandbRun


class Logged(WandbRun):
    """In place of W&B: keeps what is logged; of a picture, its size and caption."""

    def __init__(self):
        self.run = self.folder = None
        self.steps = {}

    def log(self, values, step):
        sizes = {k: v if isinstance(v, float) else (Image.open(v.path).size, v.caption) for k, v in values.items()}
        self.steps.setdefault(step, []).append(sizes)


@pytest.fixture
def process(tmp_path):
    """Makes the reports of a new process."""

    write_notes(tmp_path, {"wandb_id": "x", "drawn_with": "ddim"})

    def process():
        examples = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
        progress = Progress(trainer_config(steps=6, batch_size=2), torch.device("cpu"))
        return Reports(SimpleNamespace(folder=tmp_path), progress, Logged(), examples, ["a", "b"])

    return process


TIMES = [0, 0.5, 1.0, 1.3, 1.6, 1.7, 1.8]  # seconds of training after each step: the first are slower


def train(reports, start, last):
    """What the trainer calls; a resumed one first reports the step of its checkpoint once more."""
    reports.started(start)
    for step in range(max(start, 1), last + 1):
        if step > start:
            reports.stepped(step, lambda: 0.5)
        row = {"step": step, "images": 2 * step, "lr": 0.1, "loss": 1 / step, "grad_norm": 1.0}
        reports.logged(step, row | {"held_out_loss": 0.1234567890123}, TIMES[step])
        if step % 2 == 0:
            reports.sampled(step, torch.zeros(step, 1, 4, 4, dtype=torch.uint8))


def test_a_resumed_run_logs_the_same_to_wandb_and_publishes_the_same(process, tmp_path):
    whole = process()
    train(whole, 0, 6)
    whole.publish(tmp_path / "whole", {"parameters": 7})
    assert whole.told.wandb_run.steps[0] == [{"samples/inputs": ((14, 14), "training images")}]
    values = {"train/images": 6, "train/lr": 0.1, "train/loss": 0.333333333, "train/grad_norm": 1}
    values |= {"held_out/loss": 0.123456789, "train/images_per_second": pytest.approx(2 / 0.3)}
    assert whole.told.wandb_run.steps[3] == [values]
    assert whole.told.wandb_run.steps[4][1] == {
        "samples/grid": ((14, 14), "step 4, ddim")
    }  # a row for each of two classes
    train(process(), 0, 5)
    (tmp_path / "samples/step-x.png").touch()  # not ours
    process().started(4)
    assert [path.name for path in (tmp_path / "samples").glob("step-0*")] == ["step-000000002.png"]
    resumed = process()
    train(resumed, 4, 6)
    assert resumed.told.wandb_run.steps == whole.told.wandb_run.steps
    resumed.publish(tmp_path / "resumed", {"parameters": 7})
    names = {path.name for path in (tmp_path / "resumed/samples").iterdir()}
    assert names == {f"step-00000000{step}.png" for step in (2, 4, 6)}
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.relative_to(tmp_path / "whole")).read_bytes()
    read = {name: json.loads((tmp_path / f"resumed/{name}.json").read_text()) for name in ("train", "train-details")}
    assert read["train"] == {"images": 12, "images_per_second": 6.7}
    details = {"loss": 1 / 6, "held_out_loss": 0.1234567890123, "steps": 6, "seconds": 1.8, "parameters": 7}
    assert read["train-details"] == read["train"] | details
    film = Image.open(tmp_path / "resumed/film.png")
    assert film.width >= 640  # the first image of two classes, at three steps


@pytest.mark.parametrize(("counts", "classes", "rows"), [((5, 5), 0, 5), ((4, 16), 0, 4), ((9, 12), 10, 9)])
def test_the_film_shows_the_samples_that_all_grids_have(process, tmp_path, monkeypatch, counts, classes, rows):
    """trainer.sample_images may have been another one before; and five images leave a place of their grid empty."""
    reports, shown = process(), []
    reports.classes = [str(k) for k in range(classes)]
    reports.started(0)
    for step, count in enumerate(counts, 1):
        reports.sampled(step, torch.full((count, 1, 4, 4), 7, dtype=torch.uint8))
    monkeypatch.setattr("modeling.reporting.reports.save_picture", lambda *given: shown.append(given))
    reports._save_film(tmp_path / "film.png")
    ((_, images, _, names, steps),) = shown
    assert len(images) == rows and all((image == 7).all() for row in images for image in row)
    assert len(names) == (rows if classes else 0) and steps == ["step 1", "step 2"]
