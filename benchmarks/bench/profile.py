"""Where the time of a training step goes, operator by operator: `python -m benchmarks.bench.profile model=ddpm`.

PyTorch's own table over --steps steps, its --rows largest. Before it, for each part of as many steps, the milliseconds
until the host has asked for all of it, and until the device has done it: on a GPU the host may be what takes the time.
"""

import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import project
from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.measure import wait
from benchmarks.project import make_task
from modeling.inference.device import now
from modeling.training.trainer import Trainer

WARM = 4  # steps before


def by_part(trainer: Trainer, steps: int) -> dict[str, tuple[float, float]]:
    """Milliseconds a step of the host, and until the device is done; the device is idle when each part begins."""
    device = trainer.compute.device
    spent: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def timed(owner: Any, method: str, part: str) -> Any:
        call = getattr(owner, method)

        def measured(*args: Any, **keywords: Any) -> Any:
            start = now(device)
            result = call(*args, **keywords)
            host = time.perf_counter() - start
            done, factor = now(device) - start, 1000 / steps
            spent[part] = spent[part][0] + host * factor, spent[part][1] + done * factor
            return result

        return patch.object(owner, method, measured)

    with ExitStack() as stack:
        stack.enter_context(timed(trainer.source, "inputs", "the batch"))
        stack.enter_context(timed(trainer, "_pass", "forward and backward"))
        stack.enter_context(timed(nn.utils, "clip_grad_norm_", "clipping"))
        stack.enter_context(timed(trainer.optimizer, "step", "optimizer"))
        stack.enter_context(timed(trainer.ema, "update", "EMA"))
        for _ in range(steps):
            trainer.train_step()
    return dict(spent)


def measure(overrides: list[str], steps: int, rows: int) -> dict[str, Any]:
    """The time that each operator takes by itself, largest first."""
    task = make_task(overrides)
    device, trainer = task.compute.device, task.trainer()
    work = partial(project.train_step, trainer)
    for _ in range(WARM):
        work()
    parts = by_part(trainer, steps)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        for _ in range(steps):
            work()
        wait(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=40)
    c, machine = task.config, describe(device)
    head = f"model={c.model.name}, batch {c.trainer.batch_size}, {steps} steps, {machine['name']}"
    by_parts = "\n".join(f"{name:22}{host:8.1f} ms of the host{done:10.1f} ms" for name, (host, done) in parts.items())
    return {"table": f"{head}\n\n{by_parts}\n\n{table}", "machine": machine, "parts": parts}


main = partial(run_study, measure, text=itemgetter("table"), steps=3, rows=12)

if __name__ == "__main__":
    main()
