"""Small trainers in this process, and a reporter that records what happens."""

import os
import signal
from types import SimpleNamespace

import torch

from helpers.configs import group
from modeling.build import build_model
from modeling.data.prepared import LabelledImages
from modeling.inference.device import Compute
from modeling.training.state import CheckpointFolder
from modeling.training.trainer import Trainer

CPU = Compute(torch.device("cpu"), bf16=False)
SMALL = {"model_channels": 8, "channel_mult": [1, 2], "attention_resolutions": [4], "norm_groups": 4}
MODEL = group("model", "tiny", **SMALL, dropout=0.1)
DIFFUSION = group("diffusion", "linear", num_timesteps=20, beta_start=1e-3, beta_end=0.2)


def adam(**changes):
    return group("optimizer", "adam", **{"lr": 1e-3, "warmup_steps": 3, "betas": [0.9, 0.99]} | changes)


def sgd(**changes):
    plain = {"lr": 0.1, "warmup_steps": 0, "grad_clip": None, "momentum": 0.0, "weight_decay": 0.0}
    return group("optimizer", "sgd", **plain | changes)


def trainer_config(**changes):
    values = {"steps": 10, "batch_size": 4, "ema_decay": 0.9, "log_every": 3, "evaluate_every": 5}
    values |= {"evaluate_images": 6, "sample_every": 7, "sample_images": 2, "sample_steps": 2, "checkpoint_every": 4}
    values |= {"guide_at": 0.45}
    return group("trainer", "default", **values | changes)


class Recorder:
    """A Reporter that keeps what it gets, rows cut back on a resume as Curves does.

    A signal comes after step `stop_at`; step `kill_at` is the last of a process that ends without a word.
    """

    def __init__(self, stop_at=None, kill_at=None):
        self.stop_at, self.kill_at = stop_at, kill_at
        self.rows, self.grids, self.steps, self.starts = {}, {}, [], []

    def started(self, step):
        self.starts.append(step)
        self.rows = {k: v for k, v in self.rows.items() if k < step}
        self.grids = {k: v for k, v in self.grids.items() if k < step}

    def stepped(self, step, loss):
        self.steps.append(step)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == self.kill_at:
            raise KeyboardInterrupt

    def logged(self, step, row, seconds):
        self.rows[step] = row

    def sampled(self, step, images):
        self.grids[step] = images


def make(folder, recorder=None, optimizer=None, model=MODEL, diffusion=DIFFUSION, plain=False, compute=CPU, **changes):
    """A trainer on ten random images of 8 x 8; `plain`: of one colour each, which are quick to learn."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (10, 3, 8, 8), generator=generator, dtype=torch.uint8)
    if plain:
        images = images[:, :, :1, :1].expand(10, 3, 8, 8)
    train = LabelledImages(images, torch.arange(10) % 2)
    data = SimpleNamespace(train=train, test=train.first(8))
    model = compute.place_model(build_model(model, diffusion, (3, 8, 8), 2, seed=0))
    config = SimpleNamespace(trainer=trainer_config(**changes), optimizer=optimizer or adam(), seed=0)
    return Trainer(config, model, data, compute, CheckpointFolder(folder), recorder or Recorder())


def weights(trainer):
    """All weights, their average and the guide's, as one vector."""
    averaged, guide = trainer.ema.model.parameters(), trainer.state.guide or {}
    return torch.cat([p.detach().flatten() for p in (*trainer.parameters, *averaged, *guide.values())])
