"""Where the time of a training step goes, operator by operator: `python -m benchmarks.profile_step model=ddpm`."""

import argparse
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import project
from benchmarks.machine import describe
from benchmarks.measure import wait
from benchmarks.project import command_line, make_task

WARM = 2  # steps before


def measure(steps: int, overrides: list[str]) -> dict[str, Any]:
    """Milliseconds a step that each operator takes by itself, largest first, and of all of them."""
    task = make_task(overrides)
    device = task.compute.device
    work = project.training(task)
    for _ in range(WARM):
        work()
    wait(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(steps):
            work()
        wait(device)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    # On CUDA an operator, an annotated block and their kernels all carry the kernels' time: the kernels alone count.
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in found.key_averages() if event.device_type == kind and not event.is_user_annotation]
    times = {event.key: getattr(event, key) / 1e3 / steps for event in events}
    calls = {event.key: event.count / steps for event in events}
    order = sorted((name for name in times if times[name] > 0), key=lambda name: -times[name])
    return {
        "batch": task.config.trainer.batch_size,
        "model": task.config.model.name,
        "total": sum(times.values()),
        "rows": [{"operator": name, "ms": times[name], "calls": calls[name]} for name in order],
        "machine": describe(device),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as trainer.batch_size=32")
    arguments = parser.parse_args()
    found = measure(arguments.steps, arguments.overrides)
    print(
        f"model={found['model']}, batch {found['batch']}, {found['total']:.0f} ms a step, {found['machine']['name']}\n"
    )
    print("| operator | ms a step | share | calls a step |\n|---|---|---|---|")
    for row in found["rows"][: arguments.rows]:
        share = 100 * row["ms"] / found["total"]
        print(f"| `{row['operator']}` | {row['ms']:.1f} | {share:.0f} % | {row['calls']:.0f} |")


if __name__ == "__main__":
    command_line(main)
