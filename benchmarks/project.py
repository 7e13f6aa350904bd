"""This project as a contestant: built by its own code, from its own configuration, doing all that a step does."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Contestant
from modeling.build import build_model
from modeling.config import load_config
from modeling.data.prepared import LabelledImages, Prepared
from modeling.data.sources import shapes
from modeling.diffusion.model import DiffusionModel
from modeling.inference.device import Compute, choose_compute
from modeling.settings.groups import Config
from modeling.training.state import CheckpointFolder
from modeling.training.trainer import Reporter, Trainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOWHERE = CheckpointFolder(Path(os.devnull))  # nothing can be saved there


def configure(*overrides: str) -> Config:
    """The shipped configuration with overrides, checked."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load_config(compose("config", list(overrides)), overrides)


def compute_of(config: Config) -> Compute:
    """The device and the precision, chosen as every stage chooses them."""
    return choose_compute(config.device, config.precision, config.deterministic, config.threads)


@dataclass
class Task:
    """What all contestants train on: a configuration, and images uint8 [N, H, W, C]."""

    config: Config
    images: Any
    compute: Compute

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    @property
    def data(self) -> LabelledImages:
        """The images as this project has them; all labels are 0."""
        images = torch.from_numpy(self.images).permute(0, 3, 1, 2)
        return LabelledImages(images, torch.zeros(len(images), dtype=torch.int64))

    def model(self) -> DiffusionModel:
        """Fresh, on the device, in the memory layout that training uses."""
        c = self.config
        return self.compute.place_model(build_model(c.model, c.diffusion, self.shape, 0, c.seed))

    def trainer(self) -> Trainer:
        """It saves nothing, and its held-out loss means nothing."""
        data: Any = SimpleNamespace(train=self.data, test=self.data.first(1))
        return Trainer(self.config, self.model(), data, self.compute, NOWHERE, Reporter())


def make_task(overrides: Sequence[str], image_size: int = 32, num_images: int = 2000, precision: str = "auto") -> Task:
    """The embedded shapes under a configuration: no download, and the pixels do not matter to speed."""
    config = configure("data=shapes", f"precision={precision}", *overrides)
    (images, _), _, _ = shapes(num_images, 1, image_size, 0)
    return Task(config, images, compute_of(config))


def trainer_on(config: Config, data: Prepared, folder: Path, reporter: Reporter) -> Trainer:
    """The trainer of a whole run on prepared data, with its checkpoints in the folder."""
    compute = compute_of(config)
    model = build_model(config.model, config.diffusion, data.shape, len(data.classes), config.seed)
    return Trainer(config, compute.place_model(model), data, compute, CheckpointFolder(folder), reporter)


def train_step(trainer: Trainer) -> None:
    """One whole step: batch, noise, loss, gradients, clipping, optimizer, EMA; the loss is read when it is logged."""
    trainer.train_step()
    if trainer.step % trainer.config.log_every == 0:
        trainer._check_finite()
        trainer.state.means()


def training(task: Task) -> Contestant:
    """Training steps."""
    trainer = task.trainer()

    def work() -> float:
        train_step(trainer)
        return task.config.trainer.batch_size

    return work


def network_only(task: Task) -> Contestant:
    """Forward and backward of the network alone, on a batch that is always the same."""
    n = task.config.trainer.batch_size
    device = task.compute.device
    network = task.model().network.train()
    call = task.compute.compiled(network, task.config.trainer.compile)
    x, noise = torch.randn(2, n, *task.shape, device=device).unbind()
    t = torch.randint(task.config.diffusion.num_timesteps, (n,), device=device)

    def work() -> float:
        network.zero_grad()
        with task.compute.autocast():
            loss = (call(x, t).float() - noise).square().mean()
        loss.backward()
        return n

    return work


def training_flops(task: Task) -> float:
    """Floating-point operations of an image in training: three times those of the forward pass as computed here."""
    network = task.model().network.eval()
    x = torch.zeros(1, *task.shape, device=task.compute.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, device=x.device))
    return 3.0 * counter.get_total_flops()
