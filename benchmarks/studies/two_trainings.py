"""Two trainings at once on the same cores: `python -m benchmarks.studies.two_trainings trainer.steps=150`.

Real processes of the command line, by turns in --rounds rounds: one alone, two with the default threads, and two with
threads=1. Reports the images/s of each training, which does not count its start.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.measure import by_turns, spreads

MAIN = Path(__file__).parents[2] / "main.py"
COMMON = ["stage=train", "data=shapes", "data.num_train=640", "data.num_test=16", "model=small", "sampler=ddim"]
COMMON += ["trainer.batch_size=32", "trainer.evaluate_images=2", "trainer.sample_images=1", "trainer.sample_steps=1"]
CASES = {"one": ["null"], "two": ["null", "null"], "two, threads=1": ["1", "1"]}


def trainings(overrides: list[str], case: str) -> list[float]:
    """Images/s of each training of a case, all begun at once."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for k, threads in enumerate(CASES[case]):
            root = Path(folder, str(k))  # a root of its own: else the second would find the first
            command = [sys.executable, str(MAIN), *COMMON, *overrides, f"threads={threads}", f"hydra.run.dir={root}"]
            env = os.environ | {"DVC_ROOT": str(root), "WANDB_MODE": "disabled"}
            running.append(subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL))
        if any([process.wait() for process in running]):
            raise RuntimeError("a training failed; its last line is above")
        reports = [Path(folder, str(k), "reports/train.json") for k in range(len(running))]
        return [float(json.loads(path.read_text())["images_per_second"]) for path in reports]


def measure(overrides: list[str], rounds: int) -> dict[str, Any]:
    """The spread of the images/s of a single training in each case."""
    found = by_turns([*CASES], rounds, partial(trainings, overrides))
    each = {case: [rate for turn in turns for rate in turn] for case, turns in found.items()}
    return {"images_per_second_of_each": spreads(each), "machine": describe(torch.device("cpu"))}


main = partial(run_study, measure, rounds=3)

if __name__ == "__main__":
    main()
