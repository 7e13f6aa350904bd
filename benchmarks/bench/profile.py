"""Where the time of a training step goes, operator by operator: `python -m benchmarks.bench.profile model=ddpm`.

PyTorch's own table over --steps steps, its --rows largest.
"""

from functools import partial
from operator import itemgetter
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
    table = found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=40)
    c, machine = task.config, describe(device)
    head = f"model={c.model.name}, batch {c.trainer.batch_size}, {steps} steps, {machine['name']}"
    return {"table": f"{head}\n\n{table}", "machine": machine}


main = partial(run_study, measure, text=itemgetter("table"), steps=3, rows=12)

if __name__ == "__main__":
    main()
