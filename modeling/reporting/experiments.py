"""Experiments as W&B runs: which run a training and an evaluation log to, and telling a run as a whole.

DVC and people run one training again and again: after a crash, to go on with it, to evaluate it with another sampler.
The notes in the run's folder (run.json) say which experiment its W&B run belongs to.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from modeling.checkpoints.fingerprint import fingerprint
from modeling.checkpoints.run_folder import Run, read_notes, run_of_weights, write_notes
from modeling.reporting.curves import read_rows
from modeling.reporting.wandb_mode import wanted_mode
from modeling.reporting.wandb_run import Picture, WandbRun, about_experiment, experiment, on_server
from modeling.settings.groups import Config, SamplerConfig


class Told:
    """Logs the rows and pictures in a run's folder to W&B, one row after the other."""

    def __init__(self, folder: Path, wandb_run: WandbRun) -> None:
        self.folder = folder
        self.wandb_run = wandb_run
        self.images = self.seconds = 0.0  # of the last row
        self.drawn_with = read_notes(folder).get("drawn_with", "")

    def again(self) -> None:
        """All that earlier processes have logged."""
        with self.wandb_run.logging_again():
            self.wandb_run.log({"samples/inputs": Picture(self.folder / "inputs.png", "training images")}, 0)
            for row in read_rows(self.folder / "train.csv"):
                self.row(row)

    def row(self, row: Mapping[str, float]) -> None:
        """A row of the curves, with the picture of its step if that is drawn already; images/s since the last row."""
        step = int(row["step"])
        held_out = {"held_out/loss": row["held_out_loss"]} if "held_out_loss" in row else {}
        values = {f"train/{key}": row[key] for key in row if key not in ("step", "seconds", "held_out_loss")}
        if (seconds := row["seconds"] - self.seconds) > 0:
            values["train/images_per_second"] = (row["images"] - self.images) / seconds
        self.images, self.seconds = row["images"], row["seconds"]
        self.wandb_run.log(values | held_out, step)
        if picture_of(self.folder, step).exists():
            self.picture(step)

    def picture(self, step: int) -> None:
        """The sample grid of a step."""
        caption = f"step {step}, {self.drawn_with}"
        self.wandb_run.log({"samples/grid": Picture(picture_of(self.folder, step), caption)}, step)


def picture_of(folder: Path, step: int) -> Path:
    """Where the sample grid of a step lies in a run's folder."""
    return folder / "samples" / f"step-{step:09}.png"


def start_training_run(config: Config, run: Run, facts: Mapping[str, Any], grid_sampler: SamplerConfig) -> WandbRun:
    """The W&B run of a training, whose folder notes it; `facts` join the configuration there.

    `grid_sampler` is what draws the sample grids, for their captions.

    An unfinished training keeps its run; a finished one that another experiment goes on with or repeats gets a new one.
    """
    resolved = {key: value for key, value in dataclasses.asdict(config).items() if key != "named"}
    mine, notes = experiment(), run.notes
    if notes.get("finished") and notes.get("experiment") != mine:
        notes["wandb_id"] = fingerprint({"experiment": mine, "run": run.name})[:12]
        notes.pop("evaluated", None)
    about: dict[str, Any] = {"name": f"{config.data.name}-{config.model.name}-{run.name[:6]}", "job_type": "train"}
    about |= {"tags": [config.data.name, config.model.name]} | about_experiment()
    wandb_run = WandbRun(config.wandb, resolved | dict(facts), notes["wandb_id"], about)
    notes |= {"wandb_id": wandb_run.run_id, "experiment": mine, "finished": False}
    notes |= {"wandb": {"about": about, "facts": dict(facts)}}
    notes["drawn_with"] = grid_sampler.caption()
    write_notes(run.folder, notes)
    return wandb_run


def evaluated_with(config: Config) -> dict[str, dict[str, Any]]:
    """The groups of the configuration that decide an evaluation of given weights."""
    return {key: dataclasses.asdict(getattr(config, key)) for key in ("sampler", "evaluation")}


def log_evaluation(config: Config, meta: Mapping[str, Any], report: Mapping[str, Any], target: Path) -> None:
    """Logs an evaluation: its numbers into the summary, and the pictures that lie in `target`.

    It goes into the run of the training if that is of the same experiment and was not evaluated in another way; else
    into a run of its own. An offline run is told again from its start, so that one folder holds all of it.
    """
    used = evaluated_with(config)
    mine, way = experiment(), fingerprint(used)
    folder, notes = run_of_weights(meta["sha256"]) or (None, {})
    shared = notes.get("finished") and notes.get("experiment") == mine and notes.get("evaluated") in (None, way)
    if shared and wanted_mode(config.wandb) == "offline" and on_server(notes["wandb_id"]):
        shared = False
    if shared and folder:
        resolved = yaml.safe_load((folder / "config.yaml").read_text()) | notes["wandb"]["facts"]
        wandb_run = WandbRun(config.wandb, resolved | used, notes["wandb_id"], notes["wandb"]["about"])
        write_notes(folder, read_notes(folder) | {"evaluated": way})
        if wandb_run.run_id == notes["wandb_id"]:
            Told(folder, wandb_run).again()
    else:
        run_id = fingerprint({"experiment": mine, "weights": meta["sha256"], "used": used})[:12]
        names = (meta["config"][group]["name"] for group in ("data", "model") if group in meta["config"])
        about = {"job_type": "evaluate", "tags": list(names)} | about_experiment()
        recipe = {key: value for key, value in meta["config"].items() if key != "trainer"}
        wandb_run = WandbRun(config.wandb, recipe | used | {"weights_sha256": meta["sha256"]}, run_id, about)
    caption = config.sampler.caption()
    found = {name: target / f"{name}.png" for name in ("samples", "nearest", "denoising")}
    pictures = {f"evaluate/{name}": Picture(path, caption) for name, path in found.items() if path.exists()}
    wandb_run.log(pictures, max(meta["steps"] + 1, wandb_run.first))  # W&B drops values of a step that it has
    wandb_run.summarize(_numbers("evaluate", report))
    wandb_run.finish()


def _numbers(prefix: str, report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a nested report under names like evaluate/quality/"""
    found: dict[str, Any] = {}
    for key, value in report.items():
        name = f"{prefix}/{key}"
        found |= _numbers(name, value) if isinstance(value, dict) else {name: value}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
