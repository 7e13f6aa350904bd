"""The training loop (Ho et al. 2020, algorithm 1): step, EMA, logging, held-out loss, sample grids, checkpoints.

Randomness is a function of (seed, step), so a run that was stopped anywhere goes on bit for bit. Losses stay on the
device until they are logged. Whatever is due at step k (`_report`) happens after the checkpoint of step k is written
and happens again on a resume from it, so nothing is lost or doubled. Knows nothing of Hydra, DVC or W&B: a Reporter
hears what happens.

Of several processes, each trains on its share of every batch, and all of them take the same step: gradients are summed,
so weights, EMA and optimizer are the same in each. The first alone writes and reports.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.batches import Draws, StepInputs, step_seed
from modeling.checkpoint import checkpoints
from modeling.data import LabelledImages
from modeling.device import Compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import any_process_each, check_same, from_first, is_first, share, sum_over_processes
from modeling.drawing import draw_samples
from modeling.ema import EMA
from modeling.errors import Stopped, UserError
from modeling.files import replacing
from modeling.held_out import held_out_losses
from modeling.reporter import Reporter
from modeling.settings import DDIMConfig, OptimizerConfig, TrainerConfig
from modeling.signals import stop_requested
from modeling.state import TrainingState
from modeling.watch import Bad, Watch

EVALUATION_BATCH = 250  # of the held-out loss and
SAMPLING_BATCH = 64  # of the sample grids: neither changes a result
LOOK_EVERY = 1000  # steps between looks for what is not finite, if nothing else looks before


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (0-based) of `steps`: a linear warm-up times the decay."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(step / steps, 1.0)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * warmup * decay[config.lr_decay]


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
        folder: of the rolling checkpoints; a checkpoint in it is resumed. The first process's: the others need none.
        reporter: hears what happens; Silent in all processes but the first.
        about: written into every checkpoint beside the state: whose it is.
        start: a checkpoint to start from if the folder has none.
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
        about: Mapping[str, Any] | None = None,
        start: Path | None = None,
    ) -> None:
        self.model = model
        self.ema = EMA(model, config.ema_decay)
        self.optimizer = optimizer
        self.state = TrainingState(model, self.ema, optimizer, compute.device, about)
        self.optimizer_config = optimizer_config
        self.config = config
        self.seed = seed
        self.draws = Draws(train, config, seed, model.schedule.num_timesteps, model.num_classes, compute)
        self.test = test.first(config.evaluate_images)
        self.compute = compute
        self.folder = folder
        self.reporter = reporter
        self.start = start
        self.parameters = list(model.parameters())
        self.forward = compute.compiled(model, config.compile)
        self.watch = Watch()
        # What of the batch goes through the network at a time.
        mine = share(config.batch_size)
        size = config.micro_batch_size or len(mine)
        self.parts = [slice(start, min(start + size, mine.stop)) for start in range(mine.start, mine.stop, size)]
        self.last_row: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def run(self) -> dict[str, float]:
        """Trains up to `config.steps` and returns the values of the last step.

        Raises:
            Stopped: asked to; a checkpoint of the last step is saved.
            UserError: the loss is not finite, or no checkpoint can be written, or none of those that are there be read.
        """
        self.state.take_up(self.folder, self.start, self.config.steps)
        saved, saved_at = self.step, time.monotonic()
        self.reporter.started(self.step)
        since = time.perf_counter()
        while True:
            last = self.step == self.config.steps
            old = time.monotonic() - saved_at >= 60 * self.config.checkpoint_minutes
            stop, old = any_process_each(stop_requested(), old)
            if self.step != saved and (last or stop or old or self.step % self.config.checkpoint_every == 0):
                since = self._save(since)
                saved, saved_at = self.step, time.monotonic()
            if stop and not last:
                raise self._stopped()
            if self.step and self._due():
                since = self._lap(since)
                sums = self.state.sums.clone()
                try:
                    self._report()
                except Stopped:
                    if self.step != saved:
                        self.state.sums.copy_(sums)  # the report will be made again, from the same sums
                        self._save(time.perf_counter())  # what was dropped was no training
                    raise self._stopped() from None
                since = time.perf_counter()
            if last:
                return self.last_row
            self._train_step()
            self.reporter.stepped(self.step)
            if len(self.watch) >= LOOK_EVERY:
                since = self._lap(since)

    def _save(self, since: float) -> float:
        """Saves a checkpoint of what is finite and the same in all processes; as _lap."""
        weights = self.parameters + self.ema.shadow
        check_same(weights, f"the weights after step {self.step}")
        now = self._lap(since, weights)
        self.state.save(self.folder)
        return now

    def _stopped(self) -> Stopped:
        return Stopped(f"stopped after step {self.step}, all work is saved", trained=True)

    def _train_step(self) -> None:
        step = self.step
        rate = learning_rate(self.optimizer_config, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = self.draws.step(step)
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad()
        losses = [self._pass(inputs, part) for part in self.parts]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        sum_over_processes([loss, *(p.grad for p in self.parameters if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimizer_config.grad_clip or math.inf)
        self.optimizer.step()
        self.ema.update()
        values = torch.stack([loss, norm, torch.ones_like(norm)])
        self.state.sums += values
        self.watch.add(values)
        self.state.step += 1
        self.state.images += self.config.batch_size

    def _pass(self, inputs: StepInputs, part: slice) -> Tensor:
        """What a part of the batch adds to the step's loss; its gradient is added to the parameters'."""
        # A name for each start, so that no two parts of a step drop the same; the first is that of the whole batch.
        stream = f"dropout {part.start}" if part.start else "dropout"
        self.compute.seed(step_seed(self.seed, stream, self.step))
        with self.compute.autocast():
            losses = self.forward(*inputs.part(part))
        loss = losses.mean() * ((part.stop - part.start) / self.config.batch_size)
        loss.backward()
        detached: Tensor = loss.detach()
        return detached

    def _lap(self, since: float, weights: Sequence[Tensor] = ()) -> float:
        """Counts the time of training since `since`; waits for the device and looks for what is not finite."""
        bad = self.watch.look(self.step, weights)
        if bad is not None:
            raise self._diverged(bad)
        now = time.perf_counter()
        self.state.seconds += now - since
        return now

    def _diverged(self, bad: Bad) -> UserError:
        """The error to raise for a bad step; its batch is kept in the folder."""
        inputs = self.draws.step(bad.step - 1)._asdict()
        rate = learning_rate(self.optimizer_config, bad.step - 1, self.config.steps)
        path = Path(from_first(lambda: str(self.folder / f"bad-step-{bad.step:09}.pt")))
        batch = {name: None if value is None else value.cpu() for name, value in inputs.items()}
        batch["indices"] = self.draws.batches.indices(bad.step - 1)
        if is_first():
            with suppress(UserError), replacing(path) as partial:  # a full disk must not hide the reason
                torch.save({"step": bad.step, "lr": rate, "losses": bad.losses, **batch}, partial)
        good = from_first(lambda: [str(p) for p in checkpoints(self.folder)])
        advice = "lower optimizer.lr, raise optimizer.warmup_steps, set optimizer.grad_clip=1.0 or precision=fp32"
        if good:
            advice += f", from the last good checkpoint with trainer.resume={good[-1]}"
        return UserError(f"{bad}, learning rate {rate:.4g}: {advice}; the batch of that step is in {path}")

    def _due(self) -> bool:
        c = self.config
        return self.step == c.steps or any(self.step % n == 0 for n in (c.log_every, c.evaluate_every, c.sample_every))

    def _report(self) -> None:
        c, step = self.config, self.step
        last = step == c.steps
        row = {
            "step": step,
            "images": self.state.images,
            "lr": learning_rate(self.optimizer_config, step - 1, c.steps),
        }
        if last or step % c.log_every == 0:
            loss, norm, count = self.state.sums.tolist()
            row |= {"loss": loss / max(count, 1), "grad_norm": norm / max(count, 1)}
            self.state.sums.zero_()
        if last or step % c.evaluate_every == 0:
            with self.ema.swapped_in():
                losses, _ = held_out_losses(self.model, self.test, EVALUATION_BATCH, self.compute)
            row["held_out_loss"] = losses.double().mean().item()
        images = None
        if last or step % c.sample_every == 0:
            with self.ema.swapped_in():
                sampler = DDIMConfig("ddim", c.sample_steps, True, c.sample_images, SAMPLING_BATCH, seed=0)
                shape = self.test.images.shape[1:]
                images = draw_samples(self.model, sampler, range(c.sample_images), shape, self.compute)
        self.last_row = row
        # All of a step at once: W&B's server takes no more of a step that it has.
        self.reporter.logged(step, row, self.state.seconds)
        if images is not None:
            self.reporter.sampled(step, images)
