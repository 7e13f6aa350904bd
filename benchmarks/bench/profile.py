"""Where the time of a training step goes, operator by operator: `python -m benchmarks.bench.profile model=ddpm`.

PyTorch's own table over --steps steps, its --rows largest.
"""

from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import project
from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.measure import wait
from benchmarks.project import make_task

WARM = 2  # steps before


def measure(overrides: list[str], steps: int, rows: int) -> dict[str, Any]:
    """The time that each operator takes by itself, largest first."""
    task = make_task(overrides)
    device = task.compute.device
    work = project.training(task)
    for _ in range(WARM):
        work()
    wait(device)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        for _ in range(steps):
            work()
        wait(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    about = {"model": task.config.model.name, "batch": task.config.trainer.batch_size, "steps": steps}
    table = found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=40)
    return about | {"table": table, "machine": describe(device)}


def text(found: dict[str, Any]) -> str:
    """The table under what it is of."""
    head = f"model={found['model']}, batch {found['batch']}, {found['steps']} steps, {found['machine']['name']}"
    return f"{head}\n\n{found['table']}"


main = partial(run_study, measure, text=text, steps=3, rows=12)

if __name__ == "__main__":
    main()
