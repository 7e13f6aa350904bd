"""The progress of a training run: one live bar in a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)
LINE_EVERY = 30.0  # seconds between lines where there is no terminal
MEASURE_FOR = 5.0  # seconds of steps from which the whole time is estimated
LONG = 24 * 3600.0  # seconds of CPU training above which shorter recipes are named


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.5 h' or '20 days'."""
    for unit, size, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if unit == "h" else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


class Progress:
    """The progress of a run of `steps` steps of `batch_size` images on `device`. See Reporter for its callbacks."""

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.device = device
        self.terminal = sys.stderr.isatty()
        self.first = 0
        self.estimated = False
        self.bar: tqdm[Any] | None = None
        self.last_line = 0.0
        self.held_out: float | None = None

    def started(self, step: int) -> None:
        """Begins after `step` steps."""
        self.first = step
        self.warm = 0.0
        if step:
            log.info("going on after step %d", step)
        self.last_line = time.perf_counter()
        if self.terminal:
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def stepped(self, step: int) -> None:
        """Counts a step; estimates the whole time once, from the first measured steps (not the first of all)."""
        if self.bar is not None:
            self.bar.update()
        if self.estimated:
            return
        if step == self.first + 1:
            self._wait()
            self.warm = time.perf_counter()
        elif time.perf_counter() - self.warm > MEASURE_FOR:
            self._wait()
            per_step = (time.perf_counter() - self.warm) / (step - self.first - 1)
            self._estimate(per_step)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _estimate(self, per_step: float) -> None:
        self.estimated = True
        left = per_step * (self.steps - self.first)
        self._say(f"{self.batch_size / per_step:.1f} images/s: {duration(left)} for {self.steps - self.first} steps")
        if left > LONG and self.device.type == "cpu":
            self._say("that is long for a CPU: experiment=cifar10_cpu takes half an hour, experiment=demo minutes")

    def logged(self, step: int, row: Mapping[str, float], seconds: float) -> None:
        """Shows the newest values; `seconds` is the time of all training steps so far."""
        self.held_out = row.get("held_out_loss", self.held_out)
        speed = self.batch_size * step / seconds if seconds else 0.0
        values = [f"loss {row['loss']:.4f}"] if "loss" in row else []
        if self.held_out is not None:
            values.append(f"held-out {self.held_out:.4f}")
        values.append(f"{speed:.1f} images/s")
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(values))
        elif time.perf_counter() - self.last_line > LINE_EVERY or step == self.steps:
            self.last_line = time.perf_counter()
            left = duration(seconds / step * (self.steps - step))
            self._say(f"step {step}/{self.steps}: {', '.join(values)}, {left} left")

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            log.info("%s", line)

    def close(self) -> None:
        """Ends the live bar."""
        if self.bar is not None:
            self.bar.close()
