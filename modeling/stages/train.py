"""Stage `train`: wires data, model, checkpoints, progress and tracking to the Trainer, and publishes what it made.

The working state lies in runs/<fingerprint>/ at the repository's root and survives whatever DVC does to its outputs.
The outputs: models/model.safetensors (EMA weights and the configuration), reports/train.csv, train.json, curves.png and
samples/.
"""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from modeling.build import build_model, build_optimizer
from modeling.checkpoint import checkpoints, code_hash, fingerprint, save_model
from modeling.data import BatchSource, load_split, read_prepared
from modeling.device import Compute, choose_compute
from modeling.errors import ConfigError, Stopped
from modeling.files import make_writable, write_atomic
from modeling.history import History
from modeling.images import image_grid, save_png, to_uint8
from modeling.paths import state_root, wandb_id
from modeling.progress import Progress
from modeling.settings import Config
from modeling.signals import stop_requests
from modeling.stages.prepare import ensure_prepared
from modeling.tracking import Tracker
from modeling.training import Trainer

log = logging.getLogger(__name__)
EXAMPLES = 64  # real inputs shown in W&B
RECIPE = ("seed", "precision", "data", "model", "diffusion", "optimizer", "trainer")  # what a model file remembers


def run_fingerprint(config: Config, data_sha256: dict[str, str]) -> str:
    """Names a run by all that determines its weights: not its duration, its logging or its device."""
    model, diffusion = dataclasses.asdict(config.model), dataclasses.asdict(config.diffusion)
    del model["name"], model["weights"], diffusion["variance"]
    trainer = {
        key: getattr(config.trainer, key) for key in ("batch_size", "ema_decay", "random_flip", "timestep_sampling")
    }
    parts: dict[str, Any] = {
        "seed": config.seed,
        "precision": config.precision,
        "data": data_sha256,
        "model": model,
        "diffusion": diffusion,
        "optimizer": dataclasses.asdict(config.optimizer),
        "trainer": trainer,
        "steps": config.trainer.steps if config.optimizer.lr_decay != "none" else None,
        "code": [code_hash("training"), code_hash("build")],
    }
    return fingerprint(parts)


def run_folder(config: Config, name: str) -> Path:
    """Where a run keeps its state; one that must end before an existing state's step starts beside it."""
    folder = state_root() / "runs" / name
    steps = config.trainer.steps
    if any(int(path.stem.split("-")[1]) > steps for path in checkpoints(folder)):
        folder = folder.with_name(f"{name}-upto-{steps}")
    return folder


class _Reports:
    """Passes what the Trainer tells on to the CSV, the pictures, the progress bar and W&B."""

    def __init__(self, folder: Path, progress: Progress, tracker: Tracker, examples: Tensor, batch_size: int) -> None:
        self.folder = folder
        self.progress = progress
        self.tracker = tracker
        self.examples = examples
        self.batch_size = batch_size
        self.values: dict[str, float] = {}

    def started(self, step: int) -> None:
        self.history = History(self.folder / "train.csv", step)
        for path in (self.folder / "samples").glob("step-*.png"):
            if int(path.stem.split("-")[1]) >= step:
                path.unlink()
        if step == 0:
            self.tracker.images("inputs", self.examples, 0)
        self.progress.started(step)

    def stepped(self, step: int) -> None:
        self.progress.stepped(step)

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        self.history.add(row)
        self.progress.logged(step, row, seconds)
        self.values |= row | {"seconds": seconds, "images_per_second": row["images"] / seconds if seconds else 0.0}
        speed = {"images_per_second": self.values["images_per_second"]}
        self.tracker.log({f"train/{key}": value for key, value in (row | speed).items() if key != "step"}, step)

    def sampled(self, step: int, images: Tensor) -> None:
        save_png(self.folder / "samples" / f"step-{step:09}.png", image_grid(images))
        self.tracker.images("train/samples", images, step)


def run(config: Config, out: Path) -> None:
    """Trains, or goes on training, and publishes the model under `out`.

    Raises:
        UserError: bad input, an output that cannot be written, or a loss that is not finite.
        Stopped: a signal asked for it; all work is saved.
    """
    if config.model.weights is not None:
        raise ConfigError(f"model.weights={config.model.weights}: for stage=sample and stage=evaluate only")
    compute = choose_compute(config.device, config.precision)
    source = ensure_prepared(config, config.data)
    meta = read_prepared(source)
    model = compute.place_model(build_model(config.model, config.diffusion, meta["shape"], config.seed))
    name = run_fingerprint(config, meta["sha256"])
    folder = run_folder(config, name)
    for needed in (folder / "samples", out / "models", out / "reports"):
        make_writable(needed)
    train, test = load_split(source, "train"), load_split(source, "test")
    resolved = {key: value for key, value in dataclasses.asdict(config).items() if key != "named"}
    tracker = Tracker(config.wandb, resolved, wandb_id(folder), _display_name(config, name), state_root())
    progress = Progress(config.trainer.steps, config.trainer.batch_size, compute.device)
    examples = to_uint8(
        BatchSource(train, min(EXAMPLES, config.trainer.batch_size), config.seed, config.trainer.random_flip).batch(0)
    )
    reports = _Reports(folder, progress, tracker, examples, config.trainer.batch_size)
    _announce(config, compute, model, meta, folder)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))
    tracker.artifact("config", "config", folder / "config.yaml")
    exit_code = 1
    try:
        with stop_requests() as should_stop:
            optimizer = build_optimizer(config.optimizer, model.parameters())
            trainer = Trainer(
                model,
                optimizer,
                config.optimizer,
                config.trainer,
                config.seed,
                train,
                test,
                compute,
                folder,
                reports,
                should_stop,
            )
            trainer.run()
        exit_code = 0
    except Stopped:
        exit_code = Stopped.exit_code
        raise
    finally:
        progress.close()
        tracker.finish(exit_code)
    with trainer.ema.swapped_in() as averaged:
        about = {
            "config": {key: resolved[key] for key in RECIPE},
            "image_shape": meta["shape"],
            "classes": meta["classes"],
            "fingerprint": name,
            "run": folder.name,
            "steps": config.trainer.steps,
        }
        save_model(out / "models" / "model.safetensors", averaged.state_dict(), about)
    _publish(config, folder, out, reports, sum(p.numel() for p in model.parameters()))


def _publish(config: Config, folder: Path, out: Path, reports: _Reports, parameters: int) -> None:
    values = reports.values
    report = {
        "loss": values["loss"],
        "held_out_loss": values["held_out_loss"],
        "steps": config.trainer.steps,
        "images": int(values["images"]),
        "parameters": parameters,
        "seconds": round(values["seconds"], 1),
        "images_per_second": round(values["images_per_second"], 1),
    }
    target = out / "reports"
    write_atomic(target / "train.csv", (folder / "train.csv").read_bytes())
    write_atomic(target / "train.json", (json.dumps({"train": report}, indent=2) + "\n").encode())
    reports.history.plot(target / "curves.png")
    shutil.rmtree(target / "samples", ignore_errors=True)
    shutil.copytree(folder / "samples", target / "samples")
    log.info("model: %s; curves and samples: %s", out / "models" / "model.safetensors", target)


def _announce(config: Config, compute: Compute, model: Any, meta: dict[str, Any], folder: Path) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    t = config.trainer
    log.info("device: %s; model: %s, %s parameters", compute.describe(), config.model.name, f"{parameters:,}")
    log.info(
        "data: %s, %s training images; %s steps of %d images; state in %s",
        config.data.name,
        f"{meta['num_train']:,}",
        f"{t.steps:,}",
        t.batch_size,
        folder,
    )


def _display_name(config: Config, name: str) -> str:
    return os.environ.get("DVC_EXP_NAME") or f"{config.data.name}-{config.model.name}-{name[:6]}"
