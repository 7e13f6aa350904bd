"""Section 6: cost against batch, image size, T and processes; memory against batch; of the small network."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import project
from benchmarks.bench.size import Size
from benchmarks.measure import Elsewhere, by_turns, rates, spreads
from benchmarks.project import ROOT, Task, make_task


def scaling(size: Size) -> dict[str, Any]:
    """All of it."""
    model = "tiny" if size.model == "tiny" else "small"
    most = size.batches[-1]
    part = max(1, most // 4)
    curve = size.batches if len(size.batches) > 1 else ()  # a single batch shows nothing about memory
    memory = {str(batch): peak_memory(model, batch) for batch in curve}
    memory[f"{most}, micro batches of {part}"] = peak_memory(model, most, f"trainer.micro_batch_size={part}")

    def task(batch: int = most, image_size: int = 32, total: int = 1000) -> Task:
        overrides = (f"model={model}", f"trainer.batch_size={batch}", f"diffusion.num_timesteps={total}")
        # The same shape of network whatever the pixels: attention at the middle resolution.
        more = (f"model.attention_resolutions=[{image_size // 4}]", "trainer.sample_steps=10", "sampler.steps=10")
        return make_task(overrides + more, image_size, num_images=128)

    def speeds(tasks: Mapping[int, Task]) -> dict[str, Any]:
        torch.compiler.reset()  # it compiles only so many sizes of a module in a process
        contestants = {str(value): project.training(task) for value, task in tasks.items()}
        device = next(iter(tasks.values())).compute.device
        return spreads(rates(contestants, size.rounds, device, size.seconds))

    return {
        "model": model,
        "images_per_second_by_batch": speeds({b: task(b) for b in size.batches}),
        "images_per_second_by_image_size": speeds({s: task(most // 2, s) for s in (16, 32, 64)}),
        "images_per_second_by_T": speeds({total: task(total=total) for total in (10, 1000, 4000)}),
        "peak_megabytes_by_batch": memory,
        "images_per_second_by_processes": processes(model, size),
    }


def processes(model: str, size: Size) -> dict[str, Any]:
    """Training by the real command, with 1 and 2 processes by turns: a device each, on a CPU a share of its cores."""
    batch, steps = (2, 4) if model == "tiny" else (32, 60)
    counts = [str(n) for n in size.processes if n <= torch.cuda.device_count() or not torch.cuda.is_available()]
    command = [sys.executable, str(ROOT / "main.py"), "stage=train", "data=shapes", "data.num_train=640"]
    command += ["data.num_test=16", f"model={model}", "sampler=ddim", f"trainer.steps={steps}"]
    command += [f"trainer.{name}_every={steps}" for name in ("log", "evaluate", "sample", "checkpoint")]
    command += ["trainer.evaluate_images=2", "trainer.sample_images=1", "trainer.sample_steps=1"]
    command += [f"trainer.batch_size={batch}", "trainer.compile=false"]  # compiling takes longer than these steps

    def train(count: str) -> float:
        with tempfile.TemporaryDirectory() as folder:  # a new one each time: else the run would resume
            run = [*command, f"trainer.nproc={count}", f"hydra.run.dir={folder}"]
            env = os.environ | {"DVC_ROOT": folder, "WANDB_MODE": "disabled"}
            subprocess.run(run, cwd=folder, env=env, check=True, capture_output=True)
            report = json.loads((Path(folder) / "reports/train.json").read_text())
            return float(report["images_per_second"])

    return spreads(by_turns(counts, size.rounds, train))


def peak_memory(model: str, batch: int, *more: str) -> float:
    """Most memory, in megabytes, of two training steps: the device's, else all of a process of their own."""
    with Elsewhere() as process:
        return process.run(peak, [f"model={model}", f"trainer.batch_size={batch}", *more])


def peak(overrides: list[str]) -> float:
    """Trains two steps in this process and returns the most memory that it ever had."""
    task = make_task(overrides, num_images=128)
    work = project.training(task)
    work()
    work()
    if task.compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    # Not getrusage: Linux gives a process the peak of the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
