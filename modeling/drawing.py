"""Drawing sets of samples: which labels, which noise, in which batches. Sample k is a function of (seed, k) alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.device import Compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import sharded
from modeling.guidance import Guided
from modeling.images import image_grid, to_uint8
from modeling.sampling import (
    Denoiser,
    SampleNoise,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
    timestep_subsequence,
)
from modeling.settings import DDIMConfig, SamplerConfig


def draw_samples(
    model: DiffusionModel,
    sampler: SamplerConfig,
    indices: Sequence[int],
    shape: Sequence[int],
    compute: Compute,
    label: int | None = None,
) -> Tensor:
    """Samples number `indices`, each a function of (sampler.seed, its index) alone, whatever the batch size.

    Several processes draw a share each, and all of them must call this.

    Args:
        model: in eval mode, on the device.
        sampler: which sampler, its steps (NFE, 1 to T) and its options.
        indices: which samples.
        shape: (C, H, W) of one.
        compute: where, and in which precision.
        label: of all samples of a class-conditional model; None: sample k is of class k modulo their number.

    Returns:
        uint8 [N, C, H, W] on the CPU, in every process.

    Raises:
        ValueError: more steps than the model has.
    """
    return sharded(len(indices), lambda mine: _draw(model, sampler, [indices[k] for k in mine], shape, compute, label))


def _draw(
    model: DiffusionModel,
    sampler: SamplerConfig,
    indices: Sequence[int],
    shape: Sequence[int],
    compute: Compute,
    label: int | None,
) -> Tensor:
    timesteps = timestep_subsequence(model.schedule.num_timesteps, sampler.steps)
    images = [torch.empty(0, *shape, dtype=torch.uint8)]
    for start in range(0, len(indices), sampler.batch_size):
        batch = indices[start : start + sampler.batch_size]
        noise = SampleNoise(sampler.seed, batch, shape, compute.device)
        denoiser: Denoiser = model
        if model.num_classes:
            y = torch.tensor([k % model.num_classes if label is None else label for k in batch], device=compute.device)
            denoiser = Guided(model, y, model.num_classes, sampler.guidance_scale)
        with compute.autocast():
            if isinstance(sampler, DDIMConfig):
                x_0 = ddim_sample(denoiser, noise(), timesteps, noise, sampler.eta, sampler.clip_denoised)
            elif sampler.name == "ddpm":
                x_0 = ddpm_sample(denoiser, noise(), timesteps, noise, sampler.clip_denoised)
            else:
                x_0 = dpm_solver_sample(denoiser, noise(), timesteps, sampler.clip_denoised)
        images.append(to_uint8(x_0).cpu())
    return torch.cat(images)


def sample_grid(images: Tensor, num_classes: int) -> Tensor:
    """Samples 0 to N - 1, uint8 [N, C, H, W], as one picture; of a class-conditional model, one row a class."""
    return image_grid(images, rows=min(num_classes, len(images)) or None)
