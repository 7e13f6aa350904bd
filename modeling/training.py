"""The training loop (Ho et al. 2020, algorithm 1): step, EMA, logging, held-out loss, sample grids, checkpoints.

Randomness is a function of (seed, step), so a run that was stopped anywhere goes on bit for bit. Losses stay on the
device until they are logged. Whatever is due at step k (`_report`) happens after the checkpoint of step k is written
and happens again on a resume from it, so nothing is lost or doubled. Knows nothing of Hydra, DVC or W&B: a Reporter
hears what happens.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeling.checkpoint import load_newest, save_checkpoint
from modeling.data import BatchSource, LabelledImages, step_seed
from modeling.device import Compute
from modeling.diffusion import DiffusionModel
from modeling.drawing import draw_samples
from modeling.ema import EMA
from modeling.errors import Stopped, UserError
from modeling.held_out import held_out_losses
from modeling.settings import DDIMConfig, OptimizerConfig, TrainerConfig

EVALUATION_BATCH = 250  # of the held-out loss and
SAMPLING_BATCH = 64  # of the sample grids: neither changes a result


class Reporter(Protocol):
    """Hears what happens in training; nothing that it does changes the result."""

    def started(self, step: int) -> None:
        """Training begins, or goes on, after `step` steps."""

    def stepped(self, step: int) -> None:
        """A step is done, on the host's side; the device may still compute."""

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Values of one step; `seconds`: time of all training steps so far."""

    def sampled(self, step: int, images: Tensor) -> None:
        """uint8 [N, C, H, W], drawn with the EMA weights from fixed noise."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (0-based) of `steps`: a linear warm-up times the decay."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(step / steps, 1.0)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * warmup * decay[config.lr_decay]


def draw_timesteps(n: int, num_timesteps: int, stratified: bool, generator: torch.Generator) -> Tensor:
    """int64 [n] in [0, T), on the generator's device.

    Uniform and independent, or stratified: still uniform each, but evenly spread over the batch (Kingma et al. 2021,
    appendix I.1), which lowers the variance of the loss.
    """
    device = generator.device
    if not stratified:
        return torch.randint(num_timesteps, (n,), generator=generator, device=device)
    offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    spread = (offset + torch.arange(n, device=device) / n) % 1
    return (spread * num_timesteps).long().clamp(max=num_timesteps - 1)


class Trainer:
    """One training run.

    Args:
        model: fresh, on the device.
        optimizer: over its parameters.
        optimizer_config: for the learning rate's course and the clipping.
        config: the trainer group.
        seed: of the run.
        train: what to train on.
        test: for the held-out loss.
        compute: where, and in which precision.
        folder: of the rolling checkpoints; a checkpoint in it is resumed.
        reporter: hears what happens.
        should_stop: asked after every step.
    """

    def __init__(
        self,
        model: DiffusionModel,
        optimizer: torch.optim.Optimizer,
        optimizer_config: OptimizerConfig,
        config: TrainerConfig,
        seed: int,
        train: LabelledImages,
        test: LabelledImages,
        compute: Compute,
        folder: Path,
        reporter: Reporter,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.optimizer_config = optimizer_config
        self.config = config
        self.seed = seed
        placed = LabelledImages(compute.place(train.images), train.labels)
        self.batches = BatchSource(placed, config.batch_size, seed, config.random_flip)
        self.test = test.first(config.evaluate_images)
        self.compute = compute
        self.folder = folder
        self.reporter = reporter
        self.should_stop = should_stop
        self.ema = EMA(model, config.ema_decay)
        self.parameters = list(model.parameters())
        self.step = 0
        self.seconds = 0.0
        # Sums of loss and gradient norm since the last log, and their number.
        self.sums = torch.zeros(3, dtype=torch.float64, device=compute.device)
        self.last_row: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Trains up to `config.steps` and returns the values of the last step.

        Raises:
            Stopped: asked to; a checkpoint of the last step is saved.
            UserError: the loss is not finite, or a checkpoint cannot be written.
        """
        state = load_newest(self.folder)
        if state is not None:
            self._restore(state)
        saved = self.step
        self.reporter.started(self.step)
        since = time.perf_counter()
        while True:
            last = self.step == self.config.steps
            if self.step != saved and (last or self.step % self.config.checkpoint_every == 0):
                since = self._lap(since)
                self._save()
                saved = self.step
            if self.should_stop() and not last:
                self._lap(since)
                if self.step != saved:
                    self._save()
                raise Stopped(f"stopped after step {self.step}, all work is saved: the same command goes on from there")
            if self.step and self._due():
                since = self._lap(since)
                self._report()
                since = time.perf_counter()
            if last:
                return self.last_row
            self._train_step()
            self.step += 1
            self.reporter.stepped(self.step)

    def _train_step(self) -> None:
        step, device = self.step, self.compute.device
        rate = learning_rate(self.optimizer_config, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x_0 = self.batches.batch(step).to(device)
        y = self._labels(step) if self.model.num_classes else None
        generator = self.compute.generator(step_seed(self.seed, "noise", step))
        stratified = self.config.timestep_sampling == "stratified"
        t = draw_timesteps(len(x_0), self.model.schedule.num_timesteps, stratified, generator)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        torch.manual_seed(step_seed(self.seed, "dropout", step))
        self.model.train()
        with self.compute.autocast():
            loss = self.model(x_0, t, noise, y).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimizer_config.grad_clip or math.inf)
        self.optimizer.step()
        self.ema.update()
        self.sums += torch.stack([loss.detach(), norm, torch.ones_like(norm)])

    def _labels(self, step: int) -> Tensor:
        """int64 [B], on the device; a share of them replaced by "none", for classifier-free guidance."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, "label dropout", step))
        labels = self.batches.labels(step)
        dropped = torch.rand(len(labels), generator=generator) < self.config.label_dropout
        return torch.where(dropped, self.model.num_classes, labels).to(self.compute.device)

    def _lap(self, since: float) -> float:
        self._check_finite()  # reads from the device, so it also waits for it
        now = time.perf_counter()
        self.seconds += now - since
        return now

    def _check_finite(self) -> None:
        if not bool(self.sums.isfinite().all()):
            raise UserError(
                f"the loss is not finite at or before step {self.step}: lower optimizer.lr or set optimizer.grad_clip; "
                f"the last good checkpoint is kept in {self.folder}"
            )

    def _due(self) -> bool:
        c = self.config
        return self.step == c.steps or any(self.step % n == 0 for n in (c.log_every, c.evaluate_every, c.sample_every))

    def _report(self) -> None:
        c, step = self.config, self.step
        last = step == c.steps
        row = {
            "step": step,
            "images": step * c.batch_size,
            "lr": learning_rate(self.optimizer_config, step - 1, c.steps),
        }
        if last or step % c.log_every == 0:
            loss, norm, count = self.sums.tolist()
            row |= {"loss": loss / max(count, 1), "grad_norm": norm / max(count, 1)}
            self.sums.zero_()
        if last or step % c.evaluate_every == 0:
            with self.ema.swapped_in():
                losses, _ = held_out_losses(self.model, self.test, EVALUATION_BATCH, self.compute)
            row["held_out_loss"] = losses.double().mean().item()
        self.last_row = row
        self.reporter.logged(step, row, self.seconds)
        if last or step % c.sample_every == 0:
            with self.ema.swapped_in():
                sampler = DDIMConfig("ddim", c.sample_steps, True, c.sample_images, SAMPLING_BATCH, seed=0)
                shape = self.test.images.shape[1:]
                images = draw_samples(self.model, sampler, range(c.sample_images), shape, self.compute)
            self.reporter.sampled(step, images)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "images": self.step * self.config.batch_size,
            "seconds": self.seconds,
            "sums": self.sums.cpu(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder, self.step, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
        self.step, self.seconds = state["step"], state["seconds"]
