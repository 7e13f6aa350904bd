"""Section 5: from the command to the first step, split into its parts; what DVC adds and what W&B adds.

`python -m benchmarks.bench.startup START overrides...` is the measured process itself: it does what main.py does with
stage=train, and prints the seconds of each part as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from modeling.reliability.terminal import counted

ROOT = Path(__file__).parents[2]
STAGES = ("prepare", "train", "evaluate")
SMALL = (
    *("data=shapes", "data.num_train=256", "data.num_test=16", "model=tiny", "diffusion.num_timesteps=20"),
    *("sampler=ddim", "sampler.steps=2", "sampler.num_samples=1"),
    *("trainer.steps=1", "trainer.batch_size=2", "trainer.log_every=1"),
    *("trainer.evaluate_images=2", "trainer.sample_images=1", "trainer.sample_steps=1"),
    *("evaluation.bpd_images=2", "evaluation.bpd_timesteps=2"),
)


def child(start: float, overrides: list[str]) -> None:
    """Prints the seconds of each part since the process was started, at `start` on the clock of time.time()."""
    times = {"": start, "Python": time.time()}
    from benchmarks.project import Task, compute_of, configure, shapes, train_step  # torch comes with it

    times["imports"] = time.time()
    config = configure(*overrides)
    times["configuration"] = time.time()
    (images, _), _, _ = shapes(config.data.num_train, 1, config.data.image_size, 0)
    times["data"] = time.time()
    trainer = Task(config, images, compute_of(config)).trainer()
    times["network"] = time.time()
    train_step(trainer)
    times["first step"] = time.time()
    names = [*times]
    print(json.dumps({name: times[name] - times[last] for last, name in pairwise(names)}))


def measure(rounds: int, commands: bool) -> dict[str, Any]:
    """Seconds of each part, and of whole commands, over `rounds` runs of each, by turns.

    Args:
        commands: also whole stages, with and without W&B and DVC, in a clone of the repository as it is committed.
    """
    from benchmarks.measure import spread, spreads  # not above, where its torch would count as Python's own start

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "DVC_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    parts: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}

    def timed(name: str, command: list[str], cwd: Path = ROOT) -> str:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return done.stdout

    def stages(k: int, copy: Path) -> None:
        for mode in ("disabled", "offline"):
            settings = [*SMALL, f"seed={k}", f"wandb.mode={mode}", f"out_dir={copy.parent}/{mode}-{k}"]
            for stage in STAGES:
                timed(f"{stage}, W&B {mode}", [sys.executable, "main.py", *settings, f"stage={stage}"], copy)
        words = [word for s in (*SMALL, f"seed={rounds + k}", "wandb.mode=offline") for word in ("-S", s)]
        timed("dvc exp run", ["dvc", "exp", "run", *words], copy)

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        if commands:
            subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
        for k in counted("measuring", range(rounds), "rounds"):
            timed("main.py --help", [sys.executable, "main.py", "--help"])
            output = timed("first step", [sys.executable, "-m", "benchmarks.bench.startup", str(time.time()), *SMALL])
            for name, seconds in json.loads(output.splitlines()[-1]).items():
                parts.setdefault(name, []).append(seconds)
            if commands:
                stages(k, copy)
    found = {"seconds_to_first_step": spreads(parts), "seconds_of_commands": spreads(times)}
    if commands:
        plain, tracked = times["train, W&B disabled"], times["train, W&B offline"]
        found["seconds_that_wandb_adds_to_training"] = spread([a - b for a, b in zip(tracked, plain, strict=True)])
        alone = zip(*(times[f"{stage}, W&B offline"] for stage in STAGES), strict=True)
        added = [whole - sum(each) for whole, each in zip(times["dvc exp run"], alone, strict=True)]
        found["seconds_that_dvc_adds_to_three_stages"] = spread(added)
    return found


if __name__ == "__main__":
    child(float(sys.argv[1]), sys.argv[2:])
