"""Stage `train`: connects data, model, checkpoints, progress and W&B to the Trainer, and publishes the results.

The working state is in the folder of the run, see checkpoints/run_folder.py. The outputs: models/model.safetensors (EMA
weights and the configuration), and in reports/ train.json, train-details.json, curves/, curves.png, samples/, film.png.
"""

import dataclasses
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from modeling.build import build_model, check_sampler, check_schedule
from modeling.checkpoints.model_file import save_model, with_guide
from modeling.checkpoints.run_folder import Run, write_notes
from modeling.data.prepared import Prepared, ensure_prepared
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import is_first, world_size
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import to_uint8
from modeling.reliability.container import cores
from modeling.reliability.errors import ConfigError, Stopped
from modeling.reliability.files import make_writable, sharers, write_atomic
from modeling.reliability.signals import poll
from modeling.reporting.experiments import start_training_run
from modeling.reporting.progress import Progress
from modeling.reporting.reports import Reports
from modeling.settings.groups import Config
from modeling.settings.keys import affects
from modeling.training.at_once import grid_sampler
from modeling.training.batches import BatchSource
from modeling.training.state import CheckpointFolder
from modeling.training.trainer import Reporter, Trainer

log = logging.getLogger(__name__)
CODE = Path(__file__).parent
EXAMPLES = 64  # real inputs shown in W&B
RECIPE = ("seed", "precision", "data", "model", "diffusion", "optimizer")  # what a model file remembers


def run(config: Config, out: Path) -> None:
    """Trains, or resumes training, and publishes the model under `out`."""
    if config.model.weights is not None:
        raise ConfigError(f"model.weights={config.model.weights}: for stage=sample and stage=evaluate only")
    compute = choose_compute(config.device, config.precision, config.deterministic, config.threads)
    data = ensure_prepared(config, config.data)
    classes = data.classes if config.model.class_conditional else []
    # Now, not after the training.
    learned = config.trainer.label_dropout, config.trainer.guide_at is not None
    check_sampler(config.sampler, config.diffusion.num_timesteps, classes, *learned)
    if config.stage == "train" and "DVC_STAGE" not in os.environ:  # else stage validate has said it
        check_schedule(config.diffusion)
    model = build_model(config.model, config.diffusion, data.shape, len(data.classes), config.seed)
    model = compute.place_model(model)
    if not is_first():
        Trainer(config, model, data, compute, CheckpointFolder(), Reporter()).run()
        return
    run = Run(config, compute.bf16, data.sha256)
    for needed in (out / "models", out / "reports"):
        make_writable(needed)
    poll()
    with run.locked():
        _mention_sharers(run, compute)
        _train(config, out, run, model, data, compute)


def _mention_sharers(run: Run, compute: Compute) -> None:
    """Says which other trainings use the same cores, and what is faster for all of them."""
    others = sharers(run.folder.parent.glob("*/lock")) if compute.device.type == "cpu" else []
    threads = max(1, cores() // (1 + len(others)))
    if others and threads < torch.get_num_threads():
        log.warning(
            "%s on the same cores (process %s): threads=%d in each is faster",
            "other trainings run" if len(others) > 1 else "another training runs",
            ", ".join(map(str, others)),
            threads,
        )


def _train(config: Config, out: Path, run: Run, model: DiffusionModel, data: Prepared, compute: Compute) -> None:
    resolved = {key: value for key, value in dataclasses.asdict(config).items() if key != "named"}
    write_atomic(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)).encode())
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "git_commit": git_commit(),
        "data_sha256": data.sha256,
        "parameters": parameters,
        "device_used": compute.describe(),
        "precision_used": run.parts["precision"],
    }
    shown = BatchSource(data.train, min(EXAMPLES, config.trainer.batch_size), config.seed, config.trainer.random_flip)
    # Of the trainer's keys only those that change weights: else a resumed run would publish another file.
    recipe = {key: resolved[key] for key in RECIPE} | {"trainer": affects(config.trainer, "weights")}
    recipe["sampler"] = config.sampler.method()
    about: dict[str, Any] = {
        "config": recipe,
        "image_shape": data.meta["shape"],  # (H, W, C), as the file has always had it
        "classes": data.classes,
        "data_sha256": data.sha256,
        "steps": config.trainer.steps,
    }
    progress = Progress(config.trainer, compute.device)
    wandb_run = start_training_run(config, run, facts, grid_sampler(config.trainer))
    exit_code = 1
    try:
        classes = data.classes if model.num_classes else []
        reports = Reports(run, progress, wandb_run, to_uint8(shown.batch(0)), classes)
        _announce(config, compute, data, parameters, run.folder)
        about_checkpoint = about | {"fingerprint": run.name, "wandb_id": run.notes["wandb_id"]}
        folder = CheckpointFolder(run.folder, about_checkpoint, run.start and run.start.path)
        trainer = Trainer(config, model, data, compute, folder, reports)
        trainer.run()
        exit_code = 0
    except Stopped:
        exit_code = Stopped.exit_code
        raise
    finally:
        progress.close()
        wandb_run.finish(exit_code)
    tensors = with_guide(trainer.ema.model.state_dict(), trainer.state.guide)
    sha256 = save_model(out / "models" / "model.safetensors", tensors, about)
    # How evaluation finds the W&B run of a model.
    write_notes(run.folder, run.notes | {"weights_sha256": sha256, "finished": True})
    reports.publish(out / "reports", {"parameters": parameters, "made_on": compute.describe()})
    log.info("model: %s; curves and samples: %s", out / "models" / "model.safetensors", out / "reports")


def git_commit() -> str | None:
    """The commit of this code, if it is in a Git repository."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=CODE, stderr=subprocess.DEVNULL, text=True
        ).strip()
    return None


def _announce(config: Config, compute: Compute, data: Prepared, parameters: int, folder: Path) -> None:
    t = config.trainer
    device = compute.describe() if world_size() == 1 else f"{world_size()} processes, each {compute.describe()}"
    log.info("device: %s; model: %s, %s parameters", device, config.model.name, f"{parameters:,}")
    log.info(
        "data: %s, %s training images; %s steps of %d images; state in %s",
        config.data.name,
        f"{len(data.train.images):,}",
        f"{t.steps:,}",
        t.batch_size,
        folder,
    )
