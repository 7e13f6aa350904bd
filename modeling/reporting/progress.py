"""The progress of a training run: one live bar in a terminal, a line every half minute elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)
LINE_EVERY = 30.0  # seconds between lines where there is no terminal
MEASURE_FOR = 5.0  # seconds of steps from which the whole time is estimated
LONG = 24 * 3600.0  # seconds of CPU training above which shorter recipes are recommended


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h' or '20 days'."""
    for limit, size, text in ((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min"), (172800, 3600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / size)
    return f"{seconds / 86400:.0f} days"


class Progress:
    """The progress of a run of `steps` steps of `batch_size` images on `device`. See Reporter for its callbacks."""

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.device = device
        self.bar: tqdm[Any] = tqdm(disable=True)
        self.held_out = ""

    def started(self, step: int) -> None:
        if step:
            log.info("going on after step %d", step)
        self.first = step
        self.last_line = time.perf_counter()
        # disable=None: the bar shows nothing where there is no terminal.
        self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5, disable=None)

    def stepped(self, step: int) -> None:
        """Counts a step; estimates the whole time once, from the steps after the first one, which takes longer."""
        self.bar.update()
        if step == self.first + 1:
            self.since = self._now()
        elif time.perf_counter() - self.since > MEASURE_FOR:
            per_step = (self._now() - self.since) / (step - self.first - 1)
            self.since = math.inf
            steps = self.steps - self.first
            self._say(f"{self.batch_size / per_step:.1f} images/s: {duration(per_step * steps)} for {steps} steps")
            if per_step * steps > LONG and self.device.type == "cpu":
                self._say("that is long for a CPU: experiment=cifar10_cpu takes half an hour, experiment=demo minutes")

    def _now(self) -> float:
        """The time when the device has done all steps so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def logged(self, step: int, row: Mapping[str, float], seconds: float) -> None:
        if "held_out_loss" in row:
            self.held_out = f"held-out {row['held_out_loss']:.4f}, "
        loss = f"loss {row['loss']:.4f}, " if "loss" in row else ""
        values = f"{loss}{self.held_out}{self.batch_size * step / seconds:.1f} images/s"
        self.bar.set_postfix_str(values)
        if self.bar.disable and (time.perf_counter() - self.last_line > LINE_EVERY or step == self.steps):
            self.last_line = time.perf_counter()
            left = duration(seconds / step * (self.steps - step))
            self._say(f"step {step}/{self.steps}: {values}, {left} left")

    def _say(self, line: str) -> None:
        if self.bar.disable:
            log.info("%s", line)
        else:
            self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
