"""What is measured, section by section; each returns plain data for the table, the file and the plot.

A rate is the spread of work per second over the rounds; a ratio compares two contestants within each round.
"""

import tempfile
from functools import partial
from typing import Any

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import project
from benchmarks.bench import peers
from benchmarks.bench.size import Size
from benchmarks.measure import Contestant, Elsewhere, Hosted, rates, ratio, spread, spreads
from benchmarks.project import make_task
from modeling.diffusion.model import DiffusionModel
from modeling.evaluation.bits_per_dim import bits_per_dim
from modeling.evaluation.fid import FIDELITY, Inception
from modeling.inference.held_out import held_out_losses
from modeling.inference.samples import draw_samples
from modeling.stages.sample import place_trained
from modeling.training.batches import InputSource, draw_timesteps

OURS = "this project"
COMPILED = "this project, compiled"
LOADER = "torchvision's DataLoader"
STEPS = {"ddpm": 1000, "ddim": 50, "dpm_solver": 20}  # network evaluations of a sample, as it is usually drawn
RECIPES = {"cpu": ("cifar10_cpu", "demo"), "cuda": ("cifar10_gpu",)}  # whole steps, as a share of the matrix product
UNLABELLED = ("model.class_conditional=false", "trainer.label_dropout=0", "sampler.guidance_scale=1")


def matrix_product(device: torch.device, dtype: torch.dtype, size: int) -> Contestant:
    """A product of two square matrices; returns its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def work() -> float:
        torch.mm(a, b)
        return 2.0 * size**3

    return work


def training(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 1: whole training steps, with data loading, of the same network at the same batch."""
    host = elsewhere.contestant
    overrides = (f"model={size.model}", f"trainer.batch_size={size.batch}")
    task, exact = make_task(overrides), make_task((*overrides, "trainer.compile=false"), precision="fp32")
    device, bf16 = task.compute.device, task.compute.bf16
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
    recipes = {name: make_task((f"experiment={name}", *UNLABELLED)) for name in RECIPES.get(device.type, ())}
    contestants |= {name: project.training(each) for name, each in recipes.items()}
    peak = "matrix product"
    contestants[peak] = matrix_product(device, torch.bfloat16 if bf16 else torch.float32, size.matrix)
    found = rates(contestants, size.rounds, device, size.seconds, warm=True)
    elsewhere.clear()
    peaks = found.pop(peak)
    shares: dict[str, Any] = {}
    for name, each in recipes.items():
        images = found.pop(name)
        work = project.training_flops(each)
        share = ratio([work * rate for rate in images], peaks)
        shares[name] = {"gflop_per_image": work / 1e9, "images_per_second": spread(images), "utilisation": share}
    flops = project.training_flops(task)
    return {
        "batch": size.batch,
        "model": size.model,
        "precision": "bf16" if bf16 else "fp32",
        "gflop_per_image": flops / 1e9,
        "peak_gflops": spread([p / 1e9 for p in peaks]),
        "utilisation": ratio([flops * rate for rate in found[OURS]], peaks),
        "recipes": shares,
        "images_per_second": spreads(found),
        "ratio": {name: ratio(found[OURS], values) for name, values in found.items() if name != OURS},
    }


def step(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 2: the parts of a step around the network, and the data pipeline alone."""
    task = make_task((f"model={size.model}", f"trainer.batch_size={size.batch}"))
    compute, n = task.compute, size.batch
    trainer, network = task.trainer(), project.network_only(task)
    project.train_step(trainer)  # leaves gradients behind

    def noise() -> None:
        generator = compute.generator(0)
        t = draw_timesteps(n, trainer.model.schedule.num_timesteps, False, generator)
        x = torch.randn(n, *task.shape, generator=generator, device=compute.device)
        trainer.model.q_sample(x, t, x)

    parts = {
        "whole step": lambda: project.train_step(trainer),
        "network, forward and backward": network,
        "batch": lambda: trainer.source.batches.batch(1),
        "time steps and noise": noise,
        "clipping": lambda: torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0),
        "optimizer": lambda: trainer.optimizer.step(),
        "EMA": lambda: trainer.ema.update(),
    }

    def once(part: Any) -> float:
        part()
        return 1

    contestants = {name: partial(once, part) for name, part in parts.items()}
    found = rates(contestants, size.rounds, compute.device, size.seconds)
    inside, whole = found["network, forward and backward"], found["whole step"]
    return {
        "batch": n,
        "milliseconds": {name: spread([1e3 / rate for rate in values]) for name, values in found.items()},
        "share_around_the_network": spread([1 - w / i for w, i in zip(whole, inside, strict=True)]),
        "data": data_pipeline(size, elsewhere),
    }


def data_pipeline(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Batches of images with flips, ready for the network, against torchvision's DataLoader."""
    n = size.data_batch
    task = make_task(("model=tiny", f"trainer.batch_size={n}", "trainer.random_flip=true"))
    source = InputSource(task.config, task.data, task.model(), task.compute).batches
    steps = iter(range(2**63))

    def ours() -> float:
        source.batch(next(steps))
        return n

    contestants = {OURS: ours, LOADER: elsewhere.contestant(peers.loading, task)}
    found = rates(contestants, size.rounds, task.compute.device, size.seconds)
    return {"batch": n, "images_per_second": spreads(found), "ratio": ratio(found[OURS], found[LOADER])}


def sampling(size: Size, elsewhere: Elsewhere) -> dict[str, Any]:
    """Section 3: a few network evaluations of each sampler, with the same weights.

    The images/s of a whole sampler are extrapolated from the time of an evaluation where fewer than its own were run.
    """
    task = make_task((f"model={size.model}",))
    ours = {OURS: task.model().eval()}
    if task.compute.device.type == "cuda":
        compiled = project.configure("sampler.compile=true").sampler
        ours[COMPILED] = place_trained(task.model().eval(), compiled, task.compute)
    found: dict[str, Any] = {}
    for name, whole in STEPS.items():
        steps = min(size.evaluations, whole)
        sampler = project.configure(f"sampler={name}", f"sampler.steps={steps}").sampler

        def draw(model: DiffusionModel, sampler: Any = sampler) -> float:
            draw_samples(model, sampler, range(size.sample_batch), task.shape, task.compute)
            return float(sampler.steps * size.sample_batch)

        contestants: dict[str, Contestant | Hosted] = {key: partial(draw, model) for key, model in ours.items()}
        host = elsewhere.contestant
        contestants["diffusers"] = host(peers.diffusers_sampling, task, name, steps, size.sample_batch)
        speeds = rates(contestants, size.rounds, task.compute.device)
        elsewhere.clear()
        found[name] = {
            "batch": size.sample_batch,
            "evaluations_run": steps,
            "evaluations_of_a_sample": whole,
            "extrapolated": steps < whole,
            "evaluations_per_second": spreads(speeds),
            "images_per_second": {key: spread([v / whole for v in values]) for key, values in speeds.items()},
            "ratio": ratio(speeds[OURS], speeds["diffusers"]),
        }
        if COMPILED in speeds:
            found[name]["ratio_compiled"] = ratio(speeds[COMPILED], speeds["diffusers"])
    return found


class _Untrained(FeatureExtractorInceptionV3):
    """The feature extractor with random weights: speed does not depend on them, so none are downloaded."""

    def load_state_dict(self, *_: Any) -> None:
        """Keeps the present weights."""


def untrained_inception(device: torch.device) -> Inception:
    """The feature extractor of FID with random weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as empty:
        torch.save({}, empty.name)
        return Inception(_Untrained(*FIDELITY, feature_extractor_weights_path=empty.name), "", device)


def evaluation(size: Size) -> dict[str, Any]:
    """Section 4: images/s of the held-out loss, of bits/dim (extrapolated to T network evaluations), of features."""
    task = make_task((f"model={size.model}",))
    model, compute = task.model().eval(), task.compute
    n, some, total = 2 * size.sample_batch, 3, task.config.diffusion.num_timesteps
    data = task.data.first(n)

    def held_out() -> float:
        held_out_losses(model, data, n, compute)
        return n

    def bits() -> float:
        bits_per_dim(model, data, n, some, compute)
        return n * (some + 1) / total  # one more for the decoder's term

    inception = untrained_inception(compute.device)

    def features() -> float:
        inception.features([data.images])
        return n

    works = {"held_out_loss": held_out, "bits_per_dim": bits, "inception_features": features}
    return {"images_per_second": spreads(rates(works, size.rounds, compute.device)), "bits_extrapolated": True}
