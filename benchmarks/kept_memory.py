"""What it brings on a CPU to keep freed memory (modeling/device.py): `python -m benchmarks.kept_memory [overrides]`.

Two processes take training steps by turns: one as this project runs, one in which glibc does as it comes.
"""

import argparse
import json

from benchmarks.machine import describe
from benchmarks.measure import Contestant, Elsewhere, rates, ratio, spread
from benchmarks.project import Task, command_line, make_task, training
from modeling.inference.device import choose_compute


def keeping(task: Task) -> Contestant:
    """Training steps after what every stage begins with."""
    config = task.config
    choose_compute(config.device, config.precision, config.deterministic)
    return training(task)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the configuration, as in model=small trainer.batch_size=64")
    arguments = parser.parse_args()
    task = make_task(arguments.overrides)
    with Elsewhere() as one, Elsewhere() as other:
        contestants = {"kept": one.contestant(keeping, task), "given back": other.contestant(training, task)}
        found = rates(contestants, arguments.rounds, task.compute.device, seconds=1.0)
    about = {"overrides": arguments.overrides, "machine": describe(task.compute.device)}
    speeds = {name: spread(values) for name, values in found.items()}
    times = ratio(found["kept"], found["given back"])
    print(json.dumps(about | {"images_per_second": speeds, "ratio": times}, indent=2))


if __name__ == "__main__":
    command_line(main)
