"""Stage `train`: wires data, model, checkpoints, progress and tracking to the Trainer, and publishes what it made.

The working state lies in the folder of the run, see runs.py. The outputs: models/model.safetensors (EMA weights and the
configuration), reports/train.csv, train.json, curves.png and samples/.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from modeling.batches import BatchSource
from modeling.build import build_model, build_optimizer, check_sampler
from modeling.checkpoint import save_model
from modeling.data import LabelledImages, load_split, read_prepared
from modeling.device import Compute, choose_compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import is_first, world_size
from modeling.errors import ConfigError, Stopped
from modeling.files import make_writable, write_atomic
from modeling.images import to_uint8
from modeling.paths import state_root
from modeling.progress import Progress
from modeling.reporter import Reporter, Silent
from modeling.reports import Reports
from modeling.runs import TRAINS, Run
from modeling.settings import Config
from modeling.signals import poll
from modeling.stages.prepare import ensure_prepared
from modeling.tracking import Tracker
from modeling.training import Trainer

log = logging.getLogger(__name__)
EXAMPLES = 64  # real inputs shown in W&B
RECIPE = ("seed", "precision", "data", "model", "diffusion", "optimizer", "trainer")  # what a model file remembers


def run(config: Config, out: Path) -> None:
    """Trains, or goes on training, and publishes the model under `out`.

    Raises:
        UserError: bad input, an output that cannot be written, or a loss that is not finite.
        Stopped: a signal asked for it; all work is saved.
    """
    if config.model.weights is not None:
        raise ConfigError(f"model.weights={config.model.weights}: for stage=sample and stage=evaluate only")
    compute = choose_compute(config.device, config.precision, config.deterministic)
    source = ensure_prepared(config, config.data)
    meta = read_prepared(source)
    classes = meta["classes"] if config.model.class_conditional else []
    # Now, not when all has been trained.
    check_sampler(config.sampler, config.diffusion.num_timesteps, classes, config.trainer.label_dropout)
    model = build_model(config.model, config.diffusion, meta["shape"], len(meta["classes"]), config.seed)
    model = compute.place_model(model)
    train, test = load_split(source, "train"), load_split(source, "test")
    if not is_first():
        _trainer(config, model, compute, train, test, Path(), Silent()).run()
        return
    training_run = Run(config, compute.bf16, meta["sha256"])
    for needed in (out / "models", out / "reports"):
        make_writable(needed)
    poll()
    with training_run.claimed() as notes:
        _train(config, out, training_run, notes, model, compute, meta, train, test)


def _train(
    config: Config,
    out: Path,
    training_run: Run,
    notes: dict[str, Any],
    model: DiffusionModel,
    compute: Compute,
    meta: dict[str, Any],
    train: LabelledImages,
    test: LabelledImages,
) -> None:
    folder = training_run.folder
    resolved = {key: value for key, value in dataclasses.asdict(config).items() if key != "named"}
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)).encode())
    display_name = os.environ.get("DVC_EXP_NAME") or f"{config.data.name}-{config.model.name}-{training_run.name[:6]}"
    tracker = Tracker(config.wandb, resolved, notes["wandb_id"], display_name, state_root())
    progress = Progress(config.trainer.steps, config.trainer.batch_size, compute.device)
    shown = BatchSource(train, min(EXAMPLES, config.trainer.batch_size), config.seed, config.trainer.random_flip)
    reports = Reports(folder, notes, progress, tracker, to_uint8(shown.batch(0)), model.num_classes)
    _announce(config, compute, model, meta, folder)
    tracker.artifact("config", "config", folder / "config.yaml")
    recipe = {key: resolved[key] for key in RECIPE}
    # Without what changes no weight: else a run that was stopped and went on would publish another file.
    recipe["trainer"] = {key: resolved["trainer"][key] for key in TRAINS}
    about = {
        "config": recipe,
        "image_shape": meta["shape"],
        "classes": meta["classes"],
        "fingerprint": training_run.name,
        "run": folder.name,
        "steps": config.trainer.steps,
    }
    about_checkpoint = about | {"wandb_id": notes["wandb_id"]}
    start = training_run.start and training_run.start.path
    trainer = _trainer(config, model, compute, train, test, folder, reports, about_checkpoint, start)
    exit_code = 1
    try:
        trainer.run()
        exit_code = 0
    except Stopped:
        exit_code = Stopped.exit_code
        raise
    finally:
        progress.close()
        tracker.finish(exit_code)
    with trainer.ema.swapped_in() as averaged:
        save_model(out / "models" / "model.safetensors", averaged.state_dict(), about)
    reports.publish(out / "reports", config.trainer.steps, sum(p.numel() for p in model.parameters()))
    log.info("model: %s; curves and samples: %s", out / "models" / "model.safetensors", out / "reports")


def _trainer(
    config: Config,
    model: DiffusionModel,
    compute: Compute,
    train: LabelledImages,
    test: LabelledImages,
    folder: Path,
    reporter: Reporter,
    about: dict[str, Any] | None = None,
    start: Path | None = None,
) -> Trainer:
    return Trainer(
        model,
        build_optimizer(config.optimizer, model.parameters()),
        config.optimizer,
        config.trainer,
        config.seed,
        train,
        test,
        compute,
        folder,
        reporter,
        about,
        start,
    )


def _announce(config: Config, compute: Compute, model: Any, meta: dict[str, Any], folder: Path) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    t = config.trainer
    device = compute.describe() if world_size() == 1 else f"{world_size()} processes, each {compute.describe()}"
    log.info("device: %s; model: %s, %s parameters", device, config.model.name, f"{parameters:,}")
    log.info(
        "data: %s, %s training images; %s steps of %d images; state in %s",
        config.data.name,
        f"{meta['num_train']:,}",
        f"{t.steps:,}",
        t.batch_size,
        folder,
    )
