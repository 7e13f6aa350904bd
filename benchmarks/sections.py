"""What is measured, section by section; each returns plain data for the table, the file and the plot.

A rate is the spread of work per second over the rounds; a ratio compares two contestants within each round.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import peers, project
from benchmarks.machine import matrix_product
from benchmarks.measure import Contestant, Elsewhere, Hosted, rates, ratio, spread
from benchmarks.project import ROOT, Task, make_task
from modeling.diffusion.model import DiffusionModel
from modeling.evaluation.bits_per_dim import bits_per_dim
from modeling.evaluation.fid import FIDELITY, Inception
from modeling.inference.held_out import held_out_losses
from modeling.inference.samples import draw_samples
from modeling.settings import CHOICES, SamplerConfig
from modeling.stages.sample import place_trained
from modeling.training.batches import Draws, draw_timesteps

OURS = "this project"


@dataclass
class Size:
    """How much is measured."""

    model: str
    batch: int
    sample_batch: int
    evaluations: int  # of the network, for each sample
    rounds: int
    matrix: int  # rows of the matrix product that stands for the peak
    data_batch: int = 128


SIZES = {
    "full": Size("ddpm", 32, 8, 5, 5, 2048),
    "quick": Size("ddpm", 4, 2, 3, 3, 2048),
    "tiny": Size("tiny", 2, 2, 2, 1, 64, data_batch=8),
    "gpu": Size("ddpm", 128, 64, 50, 7, 8192),
}


def training(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 1: whole training steps, with data loading, of the same network at the same batch."""
    host = elsewhere.contestant
    overrides = (f"model={size.model}", f"trainer.batch_size={size.batch}")
    task, exact = make_task(overrides), make_task((*overrides, "trainer.compile=false"), precision="fp32")
    device = task.compute.device
    bf16 = task.compute.bf16
    contestants: dict[str, Contestant | Hosted] = {
        OURS: project.training(task),
        "this project, float32": project.training(exact),
        "diffusers (float32, its default)": host(peers.diffusers_training, task),
        "denoising-diffusion-pytorch (float32, its default)": host(peers.ddpm_pytorch_training, task),
        "plain loop (float32)": host(peers.plain_training, task),
    }
    if bf16:
        contestants["diffusers (bf16 autocast)"] = host(peers.diffusers_training, task, True)
        contestants["denoising-diffusion-pytorch (bf16 autocast)"] = host(peers.ddpm_pytorch_training, task, True)
    if device.type == "cuda":
        contestants["this project, not compiled"] = project.training(make_task((*overrides, "trainer.compile=false")))
        contestants["diffusers (bf16 autocast, compiled)"] = host(peers.diffusers_training, task, True, True)
    peak = "matrix product"
    contestants[peak] = matrix_product(device, torch.bfloat16 if bf16 else torch.float32, size.matrix)
    found = rates(contestants, size.rounds, device, seconds=0.5, warm=True)
    elsewhere.clear()
    peaks = found.pop(peak)
    flops = project.training_flops(task)
    return {
        "batch": size.batch,
        "model": size.model,
        "precision": "bf16" if bf16 else "fp32",
        "gflop_per_image": flops / 1e9,
        "peak_gflops": spread([p / 1e9 for p in peaks]),
        "utilisation": ratio([flops * rate for rate in found[OURS]], peaks),
        "images_per_second": {name: spread(values) for name, values in found.items()},
        "ratio": {name: ratio(found[OURS], values) for name, values in found.items() if name != OURS},
    }


def step(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 2: the parts of a step around the network, and the data pipeline alone."""
    task = make_task((f"model={size.model}", f"trainer.batch_size={size.batch}"))
    device = task.compute.device
    trainer = project.make_trainer(task)
    trainer._train_step()  # leaves gradients behind
    n, shape = size.batch, task.shape

    def batch() -> float:
        trainer.draws.batches.batch(1)
        return 1

    def noise() -> float:
        generator = task.compute.generator(0)
        t = draw_timesteps(n, trainer.model.schedule.num_timesteps, False, generator)
        x = torch.randn(n, *shape, generator=generator, device=device)
        trainer.model.q_sample(x, t, x)
        return 1

    def clip() -> float:
        torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
        return 1

    def optimizer() -> float:
        trainer.optimizer.step()
        return 1

    def ema() -> float:
        trainer.ema.update()
        return 1

    def whole() -> float:
        trainer._train_step()
        return 1

    network = project.network_only(task)
    parts: dict[str, Contestant] = {
        "whole step": whole,
        "network, forward and backward": lambda: network() / n,
        "batch": batch,
        "time steps and noise": noise,
        "clipping": clip,
        "optimizer": optimizer,
        "EMA": ema,
    }
    found = rates(parts, size.rounds, device, seconds=0.2)
    inside, outside = found["network, forward and backward"], found["whole step"]
    return {
        "batch": n,
        "milliseconds": {name: spread([1e3 / rate for rate in values]) for name, values in found.items()},
        "share_around_the_network": spread([1 - w / i for w, i in zip(outside, inside, strict=True)]),
        "data": data_pipeline(size, elsewhere),
    }


def data_pipeline(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Batches of images with flips, ready for the network, against torchvision's DataLoader."""
    n = size.data_batch
    task = make_task((f"trainer.batch_size={n}", "trainer.random_flip=true"), num_images=max(2000, n))
    source = Draws(task.data(), task.config.trainer, 0, 1000, 0, task.compute).batches
    theirs = elsewhere.contestant(peers.loading, task)
    step = 0

    def ours() -> float:
        nonlocal step
        step += 1
        source.batch(step)
        return n

    found = rates({OURS: ours, "torchvision's DataLoader": theirs}, size.rounds, task.compute.device, seconds=0.3)
    return {
        "batch": n,
        "images_per_second": {name: spread(values) for name, values in found.items()},
        "ratio": ratio(found[OURS], found["torchvision's DataLoader"]),
    }


def sampling(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 3: a few network evaluations of each sampler, with the same weights.

    The images/s of a whole sampler are extrapolated from the time of an evaluation where fewer than its own were run.
    """
    task = make_task((f"model={size.model}",))
    model = task.model().eval()
    compiled = None
    if task.compute.device.type == "cuda":
        asked = project.configure("sampler.compile=true").sampler
        compiled = place_trained(task.model().eval(), asked, task.compute)
    named = {"ddpm": 1000, "ddim": 50, "dpm_solver": 20}
    found: dict[str, Any] = {}
    for name, whole in named.items():
        if name not in CHOICES["sampler"][1]:
            continue
        steps = min(size.evaluations, whole)
        config = project.configure(f"sampler={name}", f"sampler.steps={steps}")

        def ours(by: DiffusionModel = model, sampler: SamplerConfig = config.sampler) -> float:
            draw_samples(by, sampler, range(size.sample_batch), task.shape, task.compute)
            return float(sampler.steps * size.sample_batch)

        theirs = elsewhere.contestant(peers.diffusers_sampling, task, name, steps, size.sample_batch)
        contestants: dict[str, Contestant | Hosted] = {OURS: ours, "diffusers": theirs}
        if compiled is not None:
            contestants["this project, compiled"] = partial(ours, compiled)
        speeds = rates(contestants, size.rounds, task.compute.device)
        elsewhere.clear()
        found[name] = {
            "batch": size.sample_batch,
            "evaluations_run": steps,
            "evaluations_of_a_sample": whole,
            "extrapolated": steps < whole,
            "evaluations_per_second": {key: spread(values) for key, values in speeds.items()},
            "images_per_second": {key: spread([v / whole for v in values]) for key, values in speeds.items()},
            "ratio": ratio(speeds[OURS], speeds["diffusers"]),
        }
        if compiled is not None:
            found[name]["ratio_compiled"] = ratio(speeds["this project, compiled"], speeds["diffusers"])
    return found


class _Untrained(FeatureExtractorInceptionV3):
    """What its weights are does not change its speed: none are downloaded."""

    def load_state_dict(self, *_: Any) -> None:
        """Keeps those that it has."""


def untrained_inception(device: torch.device) -> Inception:
    """The feature extractor of FID with random weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
        torch.save({}, empty.name)
        return Inception(_Untrained(*FIDELITY, feature_extractor_weights_path=empty.name), "", device)


def evaluation(size: Size) -> dict[str, Any]:
    """Section 4: images/s of the held-out loss, of bits/dim (extrapolated to T network evaluations), of features."""
    task = make_task((f"model={size.model}",))
    model = task.model().eval()
    n, some, total = 2 * size.sample_batch, 3, task.config.diffusion.num_timesteps
    data = task.data().first(n)

    def held_out() -> float:
        held_out_losses(model, data, n, task.compute)
        return n

    def bits() -> float:
        bits_per_dim(model, data, n, some, task.compute)
        return n * (some + 1) / total  # one more for the decoder's term

    inception = untrained_inception(task.compute.device)
    rgb = data.images.expand(-1, 3, -1, -1)

    def features() -> float:
        inception.features([rgb])
        return n

    works = {"held_out_loss": held_out, "bits_per_dim": bits, "inception_features": features}
    found = rates(works, size.rounds, task.compute.device)
    return {"images_per_second": {name: spread(values) for name, values in found.items()}, "bits_extrapolated": True}


def scaling(size: Size) -> dict[str, Any]:
    """Section 6: cost against batch, image size and T; memory against batch; of the small network."""
    model = "tiny" if size.model == "tiny" else "small"
    batches = (2,) if size.model == "tiny" else (1, 4, 16, 64)

    def speeds(tasks: dict[str, Callable[[], Task]]) -> dict[str, Any]:
        torch.compiler.reset()  # it compiles so many sizes of a module in a process, and no more
        contestants = {name: project.training(make()) for name, make in tasks.items()}
        device = make_task((f"model={model}",)).compute.device
        found = rates(contestants, size.rounds, device, seconds=0.3)
        return {name: spread(values) for name, values in found.items()}

    def task(batch: int, image_size: int = 32, total: int = 1000) -> Task:
        overrides = (f"model={model}", f"trainer.batch_size={batch}", f"diffusion.num_timesteps={total}")
        # The same shape of network whatever the pixels: attention at the middle resolution.
        more = (f"model.attention_resolutions=[{image_size // 4}]", "trainer.sample_steps=10", "sampler.steps=10")
        return make_task(overrides + more, image_size, num_images=128)

    most = batches[-1]
    part = max(1, most // 4)
    parts, micro = f"{most}, micro batches of {part}", f"trainer.micro_batch_size={part}"
    return {
        "model": model,
        "images_per_second_by_batch": speeds({str(b): lambda b=b: task(b) for b in batches}),
        "images_per_second_by_image_size": speeds({str(s): lambda s=s: task(most // 2, s) for s in (16, 32, 64)}),
        "images_per_second_by_T": speeds({str(t): lambda t=t: task(most, 32, t) for t in (10, 1000, 4000)}),
        "peak_megabytes_by_batch": {str(b): peak_memory(model, b) for b in batches}
        | {parts: peak_memory(model, most, micro)},
        "images_per_second_by_processes": processes(model, size),
    }


def processes(model: str, size: Size) -> dict[str, Any]:
    """Training by the real command, with 1 and 2 processes by turns; on a CPU they share its cores."""
    batch, steps = (2, 4) if model == "tiny" else (32, 60)
    counts = ("1", "2") if torch.cuda.device_count() != 1 else ("1",)  # a device each
    found: dict[str, list[float]] = {count: [] for count in counts}
    common = ["data=shapes", "data.num_train=640", "data.num_test=16", f"model={model}", "sampler=ddim"]
    common.append("trainer.compile=false")  # which takes longer than these steps
    rare = [f"trainer.{name}_every={steps}" for name in ("log", "evaluate", "sample", "checkpoint")]
    few = ["trainer.evaluate_images=2", "trainer.sample_images=1", "trainer.sample_steps=1"]
    sizes = [f"trainer.batch_size={batch}", f"trainer.steps={steps}"]
    with tempfile.TemporaryDirectory() as folder:

        def run(stage: str, count: str, state: str) -> None:
            options = [*common, *rare, *few, *sizes, f"trainer.nproc={count}", f"out_dir={folder}", f"stage={stage}"]
            env = os.environ | {"DVC_ROOT": str(Path(folder) / state), "WANDB_MODE": "disabled"}
            command = [sys.executable, str(ROOT / "main.py"), *options]
            subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)

        run("prepare", "1", "state")
        for k in range(size.rounds):
            for count in list(found)[:: -1 if k % 2 else 1]:
                run("train", count, f"state-{count}-{k}")  # a fresh one: else the second went on from the first
                report = json.loads((Path(folder) / "reports/train.json").read_text())
                found[count].append(report["train"]["images_per_second"])
    return {count: spread(values) for count, values in found.items()}


def peak_memory(model: str, batch: int, *more: str) -> float:
    """Most memory, in megabytes, of two training steps: the device's, else all of the process's."""
    code = "import sys; from benchmarks.sections import print_peak; print_peak(sys.argv[1:])"
    command = [sys.executable, "-c", code, f"model={model}", f"trainer.batch_size={batch}", *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(overrides: list[str]) -> None:
    """Trains two steps in this process and prints the most memory that it ever had."""
    task = make_task(overrides, num_images=128)
    work = project.training(task)
    work()
    work()
    if task.compute.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        # Not getrusage: Linux gives a process the peak of whoever started it.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) * 1024 / 1e6)


def sized(device: torch.device, name: str) -> Size:
    """The size of a mode; a GPU is given enough to do."""
    if device.type == "cuda" and name != "tiny":
        return replace(SIZES["gpu"], rounds=3) if name == "quick" else SIZES["gpu"]
    return SIZES[name]
