"""The held-out loss: the simple loss (Ho et al. 2020, equation 14) on images that never train, with fixed noise.

Image k always gets the same time step and the same noise, whatever the batch size, so two values differ by the weights
alone. The time steps are stratified: N images get N evenly spaced ones, in an order that does not depend on the images.
"""

import torch
from torch import Tensor

from modeling.data.prepared import LabelledImages
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.shares import sharded_batches
from modeling.inference.device import Compute
from modeling.inference.images import to_model
from modeling.inference.samples import SampleNoise
from modeling.reliability.signals import poll
from modeling.seeds import step_seed

SEED = 0  # of the fixed noise: not the run's, so that runs of different seeds are compared on the same noise


def held_out_timesteps(num_images: int, num_timesteps: int) -> Tensor:
    """int64 [N] in [0, T): the time step of each image, evenly spread and shuffled."""
    spread = (torch.arange(num_images) * num_timesteps + num_timesteps // 2) // num_images
    generator = torch.Generator().manual_seed(step_seed(SEED, "held-out", num_images))
    return spread[torch.randperm(num_images, generator=generator)]


def model_inputs(
    model: DiffusionModel, data: LabelledImages, indices: range, compute: Compute
) -> tuple[Tensor, Tensor | None]:
    """Images `indices` in [-1, 1] and, for a class-conditional model, their labels, on the device."""
    part = slice(indices.start, indices.stop)
    x_0 = to_model(data.images[part].to(compute.device)).contiguous()
    return x_0, data.labels[part].to(compute.device) if model.num_classes else None


@torch.no_grad()
def held_out_losses(
    model: DiffusionModel, data: LabelledImages, batch_size: int, compute: Compute
) -> tuple[Tensor, Tensor]:
    """The loss of each image, float32 [N], and its time step, int64 [N], on the CPU; all processes must call this."""
    t = held_out_timesteps(len(data.images), model.schedule.num_timesteps)

    def losses(rows: range, _: object) -> Tensor:
        poll()
        x_0, y = model_inputs(model, data, rows, compute)
        noise = SampleNoise(SEED, rows, x_0.shape[1:], "cpu")().to(compute.device)
        with compute.autocast():
            loss = model.simple_loss(x_0, t[rows.start : rows.stop].to(compute.device), noise, y)
        return loss.float().cpu()

    return sharded_batches("held-out loss", len(data.images), batch_size, losses, torch.empty(0)), t
