"""What the guarantees cost, and whether memory stays flat: `python -m benchmarks.studies.reliability`.

Speed: steps per second of the demo's network with checkpoints every 1,000 steps, CSV and an offline W&B run, as a ratio
to the same steps without any of them, by turns in fresh processes, in --rounds rounds of --steps steps. That ratio has
the noise of the machine in it, so the time inside the guarantees is also taken within a run: what it leaves for
training. Memory: the resident memory of --memory_steps steps of a very small network with everything on, as the mean of
each thousand steps.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.measure import Elsewhere, by_turns, ratio, spread, spreads
from benchmarks.project import configure
from modeling.reporting.reports import Reports
from modeling.stages import train
from modeling.training.state import TrainingState

# Checkpoints ten times as often as by default.
DEFAULTS = ["trainer.log_every=100", "trainer.checkpoint_every=1000", "wandb.mode=offline"]
NOTHING = ["trainer.log_every=10000000", "trainer.checkpoint_every=10000000", "wandb.mode=disabled"]
RARELY = ["trainer.evaluate_every=10000000", "trainer.sample_every=10000000"]  # work of its own, not a guarantee
DEMO = ["data=shapes", "data.num_train=1000", "data.num_test=64", "model=tiny", "trainer.batch_size=16", *RARELY]
SMALL = [
    *("experiment=tiny", "model.model_channels=8", "wandb.mode=offline"),
    *("trainer.log_every=10", "trainer.checkpoint_every=100", "trainer.evaluate_every=500"),
    *("trainer.sample_every=500", "trainer.sample_steps=5"),
]
WARM = 50  # steps before the clock starts


class Clock:
    """Runs the train stage in this process and notes what it takes, step by step."""

    def __init__(self, *overrides: str, ends: tuple[int, ...] = ()) -> None:
        self.marks = np.zeros((100_000, 2))  # seconds and resident bytes; not a list, whose growth would count
        self.beside: list[float] = []  # processor time of W&B's processes after each of the steps `ends`
        self.rows = _timed(Reports, "logged")
        self.checkpoints = _timed(TrainingState, "save")
        process, stepped = psutil.Process(), Reports.stepped

        def marked(reports: Reports, step: int, loss: Callable[[], float]) -> None:
            stepped(reports, step, loss)
            self.marks[step - 1] = time.perf_counter(), process.memory_info().rss
            if step in ends:
                times = [child.cpu_times() for child in process.children(recursive=True)]
                self.beside.append(sum(t.user + t.system for t in times))

        Reports.stepped = marked
        os.environ.pop("WANDB_MODE", None)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DVC_ROOT"] = folder
            train.run(configure(*overrides), Path(folder) / "out")


def _timed(cls: Any, name: str) -> list[float]:
    """The seconds of each call of a method from now on."""
    method, seconds = getattr(cls, name), []

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        method(*arguments)
        seconds.append(time.perf_counter() - start)

    setattr(cls, name, timed)
    return seconds


def speed(steps: int, *overrides: str) -> dict[str, float]:
    """Steps a second after the warm-up, and which share of the time rows, checkpoints and W&B's processes took.

    What runs beside the trainer takes at most its processor time, divided by the cores; that much is counted.
    """
    end = WARM + steps
    clock = Clock(*DEMO, f"trainer.steps={end + 5}", *overrides, ends=(WARM, end))
    seconds = clock.marks[end - 1, 0] - clock.marks[WARM - 1, 0]
    rows, checkpoints = clock.rows[:-1], clock.checkpoints[:-1]  # those of the last step are for publishing
    beside = (clock.beside[1] - clock.beside[0]) / len(os.sched_getaffinity(0))
    return {
        "steps_per_second": steps / seconds,
        "row_ms": 1000 * statistics.mean(rows or [0.0]),
        "checkpoint_ms": 1000 * statistics.mean(checkpoints or [0.0]),
        "left_for_training": 1 - (sum(rows) + sum(checkpoints) + beside) / seconds,
    }


def memory(steps: int) -> dict[str, Any]:
    """Mean resident memory, in MB, over each thousand steps."""
    rss = Clock(*SMALL, f"trainer.steps={steps}").marks[:steps, 1] / 1e6
    means = [round(float(rss[k : k + 1000].mean()), 1) for k in range(0, steps, 1000)]
    return {"steps": steps, "mean_mb": means, "peak_mb": round(float(rss.max()), 1)}


def measure(overrides: list[str], rounds: int, steps: int, memory_steps: int) -> dict[str, Any]:
    """Both; the overrides are for the speed."""
    settings = {"with": DEFAULTS, "without": NOTHING}

    def fresh(function: Any, *arguments: Any) -> Any:
        with Elsewhere() as process:
            return process.run(function, *arguments)

    found = by_turns([*settings], rounds, lambda name: fresh(speed, steps, *settings[name], *overrides))
    speeds = {name: [values["steps_per_second"] for values in runs] for name, runs in found.items()}
    return {
        "steps_per_second": spreads(speeds),
        "ratio": ratio(speeds["with"], speeds["without"]),
        **{key: spread([v[key] for v in found["with"]]) for key in ("row_ms", "checkpoint_ms", "left_for_training")},
        "memory": fresh(memory, memory_steps),
        "seed": 0,
        "machine": describe(torch.device("cpu")),
    }


main = partial(run_study, measure, rounds=3, steps=1000, memory_steps=10_000)

if __name__ == "__main__":
    main()
