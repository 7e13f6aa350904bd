"""The training loop (Ho et al. 2020, algorithm 1): step, EMA, logging, held-out loss, sample grids, checkpoints.

Randomness is a function of (seed, step), so a run that was stopped anywhere resumes bit for bit. Losses stay on the
device until they are logged. Whatever is due at step k (`_report`) happens after the checkpoint of step k is written,
and happens again on a resume from it, so nothing is lost or doubled. Knows nothing of Hydra, DVC or W&B.

Each of several processes trains on its share of every batch, and all of them take the same step: gradients are summed,
so weights, EMA and optimizer are the same in each. The first alone writes and reports.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modeling.data.prepared import Prepared
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import any_process_each, check_same, sum_over_processes
from modeling.distributed.shares import share
from modeling.inference.device import Compute
from modeling.inference.held_out import held_out_losses
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import Stopped
from modeling.reliability.signals import stop_requested
from modeling.seeds import step_seed
from modeling.settings.groups import Config
from modeling.training.at_once import EVALUATION_BATCH, grid_sampler, images_at_once, without_gradients
from modeling.training.batches import InputSource, StepInputs
from modeling.training.divergence import Divergence
from modeling.training.ema import EMA
from modeling.training.optimizer import build_optimizer, learning_rate
from modeling.training.state import CheckpointFolder, TrainingState

CHECK_EVERY = 1000  # steps between checks for divergence, if nothing else checks before


class Reporter:
    """The trainer's callbacks, which report nothing here. Nothing that a reporter does changes the result."""

    def started(self, step: int) -> None:
        """Training begins, or resumes, after `step` steps."""

    def stepped(self, step: int, loss: Callable[[], float]) -> None:
        """The host has done a step; the device may still compute. `loss` waits for it: the mean since the last log."""

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """The values of a step; `seconds` is the time of all training steps so far."""

    def sampled(self, step: int, images: Tensor) -> None:
        """uint8 [N, C, H, W], drawn with the EMA weights from fixed noise."""


class Trainer:
    """One training run of a fresh model on the device; `run` resumes from the newest checkpoint of the folder.

    All processes but the first get a plain Reporter and an empty CheckpointFolder.
    """

    def __init__(
        self,
        config: Config,
        model: DiffusionModel,
        data: Prepared,
        compute: Compute,
        folder: CheckpointFolder,
        reporter: Reporter,
    ) -> None:
        self.config = config.trainer
        self.optimizer_config = config.optimizer
        self.seed = config.seed
        self.model = model
        self.compute = compute
        self.folder = folder
        self.reporter = reporter
        self.parameters = list(model.parameters())
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        self.ema = EMA(model, self.config.ema_decay)
        self.state = TrainingState(model, self.ema, self.optimizer, compute.device)
        self.source = InputSource(config, data.train, model, compute)
        self.test = data.test.first(self.config.evaluate_images)
        self.divergence = Divergence(config, self.source, folder)
        # The parts of the batch that go through the network one after another.
        mine = share(self.config.batch_size)
        size = images_at_once(self.config)
        self.parts = [slice(start, min(start + size, mine.stop)) for start in range(mine.start, mine.stop, size)]
        # Replayed only in one part, since the gradient of the first would lie where the second writes; and without
        # dropout, which is not understood under a replay: docs/reliability.md.
        dropout = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
        self.forward = compute.compiled(model, self.config.compile, len(self.parts) == 1 and not dropout)
        self.last_row: dict[str, float] = {}
        self._since = 0.0  # when the time that is not yet counted as training began

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def run(self) -> dict[str, float]:
        """Trains up to `trainer.steps` and returns the values of the last step.

        Stopped if a stop was requested, after a checkpoint; UserError if the loss is not finite, or checkpoints cannot
        be written or read.
        """
        self.model.train()
        self.state.resume(self.folder, self.config.steps)
        self._keep_guide()
        saved, saved_at = self.step, time.monotonic()
        self.reporter.started(self.step)
        self._since = time.perf_counter()
        while True:
            last = self.step == self.config.steps
            old = time.monotonic() - saved_at >= 60 * self.config.checkpoint_minutes
            stop, old = any_process_each(stop_requested(), old)
            if self.step != saved and (last or stop or old or self.step % self.config.checkpoint_every == 0):
                self._save()
                saved, saved_at = self.step, time.monotonic()
            if stop and not last:
                raise self._stopped()
            if self.step and self._due():
                self._check_finite()
                sums, count = self.state.sums, self.state.count
                try:
                    self._report()
                except Stopped:
                    if self.step != saved:
                        self.state.sums, self.state.count = sums, count  # the report will be made again from these
                        self._since = time.perf_counter()  # the dropped report is no training
                        self._save()
                    raise self._stopped() from None
                self._since = time.perf_counter()
            if last:
                return self.last_row
            self.train_step()
            self.reporter.stepped(self.step, self.state.mean_loss)
            if len(self.divergence.unchecked) >= CHECK_EVERY:
                self._check_finite()

    def _save(self) -> None:
        """Saves a checkpoint, unless it is not finite or differs between the processes."""
        weights = [*self.parameters, *self.ema.model.parameters()]
        check_same(weights, f"the weights after step {self.step}")
        self._check_finite(weights)
        self.state.save(self.folder)

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped after step {self.step}, all work is saved", trained=True)

    def train_step(self) -> None:
        """Takes one optimizer step on the batch of the current step."""
        step = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optimizer_config, step, self.config.steps)
        inputs = self.source.inputs(step)
        self.optimizer.zero_grad()
        losses = [self._pass(inputs, part) for part in self.parts]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        sum_over_processes([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimizer_config.grad_clip or math.inf)
        self.optimizer.step()
        self.ema.update()
        self.state.add({"loss": loss, "grad_norm": norm})
        self.divergence.add(loss, norm)
        self.state.step += 1
        self.state.images += self.config.batch_size
        self._keep_guide()

    def _keep_guide(self) -> None:
        """Keeps the guide once its step is done; at once where the checkpoint of another run, without one, is later."""
        at = self.config.guide_at
        due = None if at is None else math.ceil(round(at * self.config.steps, 6))  # 0.55 of 100 is above 55 in floats
        if due is None or self.step < due:
            self.state.guide = None  # that of a shorter run, from whose checkpoint this one goes on
        elif self.state.guide is None:
            self.state.keep_guide()

    def _pass(self, inputs: StepInputs, part: slice) -> Tensor:
        """Adds the gradient of a part of the batch to the parameters' and returns its share of the step's loss."""
        # A stream for each part, so that no two drop the same elements; the first part's is that of a whole batch.
        stream = f"dropout {part.start}" if part.start else "dropout"
        self.compute.seed(step_seed(self.seed, stream, self.step))
        with self.compute.autocast():
            losses = self.forward(*inputs.part(part))
        loss = losses.mean() * ((part.stop - part.start) / self.config.batch_size)
        loss.backward()
        detached: Tensor = loss.detach()
        return detached

    def _check_finite(self, weights: Sequence[Tensor] = ()) -> None:
        """Waits for the device and counts the time of training since the last check; UserError as Divergence says."""
        self.divergence.check(self.step, weights)
        now = time.perf_counter()
        self.state.seconds += now - self._since
        self._since = now

    def _due(self) -> bool:
        c = self.config
        return self.step == c.steps or any(self.step % n == 0 for n in (c.log_every, c.evaluate_every, c.sample_every))

    def _report(self) -> None:
        c, step, ema = self.config, self.step, self.ema.model
        last = step == c.steps
        rate = learning_rate(self.optimizer_config, step - 1, c.steps)
        row: dict[str, float] = {"step": step, "images": self.state.images, "lr": rate}
        if last or step % c.log_every == 0:
            row |= self.state.means()
        if last or step % c.evaluate_every == 0:
            losses, _ = held_out_losses(ema, self.test, without_gradients(c, EVALUATION_BATCH), self.compute)
            row["held_out_loss"] = losses.double().mean().item()
        images = None
        if last or step % c.sample_every == 0:
            shape = self.test.images.shape[1:]
            images = draw_samples(ema, grid_sampler(c), range(c.sample_images), shape, self.compute)
        self.last_row = row
        # All values of a step at once: W&B's server accepts no more of a step that it has.
        self.reporter.logged(step, row, self.state.seconds)
        if images is not None:
            self.reporter.sampled(step, images)
