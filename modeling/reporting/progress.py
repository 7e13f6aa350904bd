"""The progress of a training run: what it says of its speed, its loss and the time that is left."""

import logging
import math
import time
from collections.abc import Callable, Mapping

import torch

from modeling.inference.device import now
from modeling.reliability.terminal import Bar, duration
from modeling.settings.groups import TrainerConfig

log = logging.getLogger(__name__)
SETTLED = 3  # steps after which those of a compiled network, or on CUDA, take their usual time
MEASURE_FOR = 5.0  # seconds of steps from which the whole time is estimated
LONG = 24 * 3600.0  # seconds of CPU training above which shorter recipes are recommended
SHORTER = "experiment=cifar10_cpu takes an hour or two, experiment=demo minutes"


class Progress:
    """The progress of a run on `device`. See Reporter for its callbacks."""

    def __init__(self, trainer: TrainerConfig, device: torch.device) -> None:
        self.trainer = trainer
        self.device = device
        self.bar: Bar | None = None
        self.held_out = ""

    def started(self, step: int) -> None:
        if step:
            log.info("going on after step %d", step)
        self.first, self.since = step, time.perf_counter()
        self.bar = Bar("training", self.trainer.steps, "steps", step)
        self.bar.shown_at = -math.inf  # the first step is shown

    def stepped(self, step: int, loss: Callable[[], float]) -> None:
        """Counts a step; estimates the whole time once; shows the loss after the first step and when it is due.

        From the first step only if it is long: it takes longer than others, minutes if the network is compiled, and on
        CUDA the next ones record its graphs.
        """
        assert self.bar is not None
        done = step - self.first
        steady = self.device.type == "cpu" and not self.trainer.compile
        settled = 1 if steady else SETTLED
        if done <= settled:
            time_now = now(self.device)
            if not (steady and self._estimated(time_now - self.since, 1)):
                self.since = time_now
        elif time.perf_counter() - self.since > MEASURE_FOR:
            self._estimated(now(self.device) - self.since, done - settled)
        if step == self.trainer.steps:
            self.bar.shown_at = time.perf_counter()  # `logged` will show more
        self.bar.to(step, lambda: self._values(loss()))

    def _estimated(self, seconds: float, measured: int) -> bool:
        """Says how long the run will take if that many steps took long enough to tell."""
        if seconds <= MEASURE_FOR:
            return False
        self.since = math.inf
        per_step, steps = seconds / measured, self.trainer.steps - self.first
        log.info(
            "%.1f images/s: %s for %d steps", self.trainer.batch_size / per_step, duration(per_step * steps), steps
        )
        if per_step * steps > LONG and self.device.type == "cpu":
            log.info("that is long for a CPU: %s", SHORTER)
        return True

    def logged(self, step: int, row: Mapping[str, float]) -> None:
        assert self.bar is not None
        if "held_out_loss" in row:
            self.held_out = f", held-out {row['held_out_loss']:.4f}"
        if "loss" in row and (step == self.trainer.steps or self.bar.live or self.bar.due()):
            self.bar.show(self._values(row["loss"]))

    def _values(self, loss: float) -> str:
        assert self.bar is not None
        speed = self.bar.rate() * self.trainer.batch_size
        return f"loss {loss:.4f}{self.held_out}" + (f", {speed:.1f} images/s" if speed else "")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
