"""What a CPU gains by keeping freed memory (modeling/inference/device.py): `python -m benchmarks.studies.kept_memory`.

Two processes take training steps by turns, in --rounds rounds: one as this project runs, one with glibc's defaults.
"""

from functools import partial
from typing import Any

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.measure import Contestant, Elsewhere, rates, ratio, spreads
from benchmarks.project import Task, compute_of, make_task, training


def keeping(task: Task) -> Contestant:
    """Training steps after what every stage begins with."""
    compute_of(task.config)
    return training(task)


def measure(overrides: list[str], rounds: int) -> dict[str, Any]:
    """Images per second of both, and their ratio."""
    task = make_task(overrides)
    device = task.compute.device
    with Elsewhere() as one, Elsewhere() as other:
        contestants = {"kept": one.contestant(keeping, task), "given back": other.contestant(training, task)}
        found = rates(contestants, rounds, device, seconds=1.0)
    times = ratio(found["kept"], found["given back"])
    return {"images_per_second": spreads(found), "ratio": times, "machine": describe(device)}


main = partial(run_study, measure, rounds=12)

if __name__ == "__main__":
    main()
