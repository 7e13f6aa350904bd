"""Sets of samples: which labels, which noise, in which batches. Sample k is a function of (seed, k) alone."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.diffusion.model import DiffusionModel, Prediction
from modeling.diffusion.samplers import SAMPLERS, timestep_subsequence
from modeling.distributed.shares import sharded_batches
from modeling.inference.device import Compute
from modeling.inference.images import to_uint8
from modeling.reliability.signals import poll
from modeling.settings.groups import SamplerConfig
from modeling.settings.keys import own_keys

SAMPLING = "sampling"  # the name of its progress


class SampleNoise:
    """Noise of samples `indices`, each of `shape` (C, H, W), drawn on `device`: a function of (seed, k) alone."""

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str) -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        # Mixed by hand, since consecutive seeds of one generator must not meet those of the next seed.
        self.generators = [
            torch.Generator(self.device).manual_seed((seed * 0x9E3779B97F4A7C15 + k) % 2**63) for k in indices
        ]

    def __call__(self) -> Tensor:
        """[N, C, H, W], the next draw of every sample."""
        return torch.stack([torch.randn(self.shape, generator=g, device=self.device) for g in self.generators])


class DenoisingStrip:
    """Watches the batch that begins with sample 0: keeps x_t of its first `count` at `frames` of the time steps."""

    def __init__(self, alphas_cumprod: Tensor, sampler: SamplerConfig, count: int, frames: int) -> None:
        timesteps = timestep_subsequence(alphas_cumprod, sampler.steps, sampler.spacing)
        last, frames = len(timesteps) - 1, min(frames, len(timesteps))
        self.wanted = {timesteps[round(k * last / max(frames - 1, 1))] for k in range(frames)}
        self.last = timesteps[-1]
        self.count = count
        self.frames: dict[int, Tensor] = {}  # uint8 [count, C, H, W] by time step
        self.complete = False

    def rows(self) -> int:
        """How many samples it has seen from the first frame to the last."""
        return len(self.frames[self.last]) if self.complete else 0

    def __call__(self, x_t: Tensor, t: Tensor) -> None:
        if self.complete:
            return
        step = int(t[0])
        if step in self.wanted:
            self.frames.setdefault(step, to_uint8(x_t[: self.count]).cpu())
        self.complete = step == self.last


def denoise(
    model: DiffusionModel,
    sampler: SamplerConfig,
    noise: Callable[[], Tensor],
    y: Tensor | None,
    compute: Compute,
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images [N, C, H, W], nominally in [-1, 1], on the device: from x_T, the first draw of `noise`, by the sampler.

    `y` are the labels [N] of a class-conditional model. `seen` gets every (x_t, t) after the network has seen it.
    """
    abar = model.schedule.table()

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        scales = sampler.guidance_scale, sampler.autoguidance_scale
        prediction = model.predict(x_t, t, sampler.clip_denoised, y, *scales)
        if seen:
            seen(x_t, t)
        return prediction

    timesteps = timestep_subsequence(abar, sampler.steps, sampler.spacing)
    with compute.autocast():
        return SAMPLERS[sampler.name](predict, noise(), timesteps, abar, noise, **own_keys(sampler))


def draw_samples(
    model: DiffusionModel,
    sampler: SamplerConfig,
    indices: Sequence[int],
    shape: Sequence[int],
    compute: Compute,
    label: int | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples number `indices`, each of `shape` (C, H, W): uint8 [N, C, H, W] on the CPU. All processes must call this.

    `label` is that of all samples of a class-conditional model; None: sample k is of class k modulo their number.
    `watch` sees every (x_t, t) of the batch that begins with sample 0.
    """

    def draw(rows: range, tell: Callable[[float], None]) -> Tensor:
        batch = [indices[k] for k in rows]
        noise = SampleNoise(sampler.seed, batch, shape, compute.device)
        y, done = None, itertools.count(1)
        if model.num_classes:
            labels = [k % model.num_classes if label is None else label for k in batch]
            y = torch.tensor(labels, device=compute.device)

        def seen(x_t: Tensor, t: Tensor) -> None:
            poll()
            if watch and batch[0] == 0:
                watch(x_t, t)
            tell(next(done) / sampler.steps)

        return to_uint8(denoise(model, sampler, noise, y, compute, seen)).cpu()

    empty = torch.empty(0, *shape, dtype=torch.uint8)
    return sharded_batches(SAMPLING, len(indices), sampler.batch_size, draw, empty)
