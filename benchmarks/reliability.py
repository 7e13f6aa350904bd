"""What the guarantees cost, and whether memory stays flat: `python -m benchmarks.reliability cost` or `memory`.

`cost`: steps per second of the demo's network with checkpoints every 1,000 steps, CSV and an offline W&B run,
as a ratio to the same steps without any of them, by turns in fresh processes. That ratio has the noise of the machine
in it, so the time inside the guarantees is also taken within a run: what it leaves for trainer. `memory`: the resident
memory of 10,000 steps of a very small network with everything on, the first thousand against the last. Both print one
JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import torch

from benchmarks.machine import describe
from benchmarks.measure import ratio, spread
from benchmarks.project import command_line, configure
from modeling.reporting.reports import Reports
from modeling.stages import train
from modeling.training import trainer
from modeling.training.state import TrainingState

DEFAULTS = [
    "trainer.log_every=100",
    "trainer.checkpoint_every=1000",
    "wandb.mode=offline",
]  # checkpoints ten times as often as by default
NOTHING = ["trainer.log_every=10000000", "trainer.checkpoint_every=10000000", "wandb.mode=disabled"]
RARELY = ["trainer.evaluate_every=10000000", "trainer.sample_every=10000000"]  # work of its own, not a guarantee
DEMO = ["data=shapes", "data.num_train=1000", "data.num_test=64", "model=tiny", "trainer.batch_size=16"]
SMALL = [
    *("data=shapes", "data.num_train=64", "data.num_test=16", "data.image_size=8", "model=tiny"),
    *("model.model_channels=8", "model.channel_mult=[1,2]", "model.attention_resolutions=[4]"),
    *("diffusion.num_timesteps=20", "sampler=ddim", "sampler.steps=3", "trainer.batch_size=4"),
    *("trainer.evaluate_every=500", "trainer.evaluate_images=16"),
    *("trainer.sample_every=500", "trainer.sample_images=4", "trainer.sample_steps=5"),
]
WARM = 50  # steps before the clock starts
STEPS = 1000  # that are timed: the ends of ten log intervals and of one checkpoint interval lie among them


class Marked(Reports):
    """Notes the time and the resident memory of this process at every step, and what its reports cost."""

    logging: ClassVar[list[float]] = []  # seconds of each row
    beside: ClassVar[list[float]] = []  # processor seconds of W&B's processes, at both ends of what is timed
    marks = np.zeros((100_000, 2))  # of one run; not a list, whose growth would be measured too
    process = psutil.Process()

    def stepped(self, step: int) -> None:
        """See Reporter."""
        super().stepped(step)
        self.marks[step - 1] = time.perf_counter(), self.process.memory_info().rss
        if step in (WARM, WARM + STEPS):
            times = [child.cpu_times() for child in self.process.children(recursive=True)]
            self.beside.append(sum(t.user + t.system for t in times))

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""
        with timed(self.logging):
            super().logged(step, row, seconds)


class Saved(TrainingState):
    """Notes the time that checkpoints take."""

    saving: ClassVar[list[float]] = []  # seconds of each

    def save(self, folder: Path) -> None:
        """See TrainingState."""
        with timed(self.saving):
            super().save(folder)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Appends how long the block took."""
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def marks(*overrides: str) -> Any:
    """Runs the real train stage in a throw-away folder. Returns [steps, 2]: seconds, and resident bytes, after each."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DVC_ROOT"] = folder
        os.environ.pop("WANDB_MODE", None)
        train.Reports = Marked  # type: ignore[misc]  # the stage's reports, with a clock
        trainer.TrainingState = Saved  # type: ignore[misc]
        config = configure(*overrides)
        train.run(config, Path(folder) / "out")
    return Marked.marks[: config.trainer.steps]


def speed(*overrides: str) -> dict[str, float]:
    """Steps a second after the warm-up, and which share of the time rows, checkpoints and W&B's processes took.

    What runs beside the trainer takes at most its processor time, divided by the cores; that much is counted.
    """
    found = marks(*DEMO, *RARELY, f"trainer.steps={WARM + STEPS + 5}", *overrides)
    seconds = found[WARM + STEPS - 1][0] - found[WARM - 1][0]
    inside = sum(Marked.logging[:-1]) + sum(Saved.saving[:-1])  # all but those of the last step, for publishing
    beside = (Marked.beside[1] - Marked.beside[0]) / len(os.sched_getaffinity(0))
    return {
        "steps_per_second": STEPS / seconds,
        "row_ms": 1000 * statistics.mean(Marked.logging[:-1] or [0.0]),
        "checkpoint_ms": 1000 * statistics.mean(Saved.saving[:-1] or [0.0]),
        "left_for_training": 1 - (inside + beside) / seconds,
    }


def cost(rounds: int) -> dict[str, Any]:
    """The spread of both measures; a process each, by turns."""
    found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for k in range(rounds):
        for name in list(found)[:: -1 if k % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.reliability", f"speed-{name}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    speeds = {name: [values["steps_per_second"] for values in runs] for name, runs in found.items()}
    measured = ("row_ms", "checkpoint_ms", "left_for_training")
    return {
        "steps_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratio": ratio(speeds["with"], speeds["without"]),
        **{key: spread([values[key] for values in found["with"]]) for key in measured},
    }


def memory(steps: int) -> dict[str, Any]:
    """Mean resident memory, in MB, over each thousand steps."""
    found = marks(*SMALL, *DEFAULTS, "trainer.log_every=10", "trainer.checkpoint_every=100", f"trainer.steps={steps}")
    rss = found[:, 1] / 1e6
    means = [rss[k : k + 1000].mean() for k in range(0, len(rss), 1000)]
    return {"steps": steps, "mean_mb": [round(float(m), 1) for m in means], "peak_mb": round(float(rss.max()), 1)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cost", "memory", "speed-with", "speed-without"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    if arguments.what.startswith("speed"):
        print(json.dumps(speed(*(DEFAULTS if arguments.what == "speed-with" else NOTHING))))
        return
    found = cost(arguments.rounds) if arguments.what == "cost" else memory(arguments.steps)
    print(json.dumps(found | {"seed": 0, "machine": describe(torch.device("cpu"))}, indent=2))


if __name__ == "__main__":
    command_line(main)
