"""The held-out loss: the simple loss (Ho et al. 2020, equation 14) on images that never train, under fixed noise.

Image k always meets the same time step and the same noise, whatever the batch size, so two values differ by the weights
alone. The time steps are stratified: N images get N evenly spaced ones, in an order that does not depend on the images.
"""

import torch
from torch import Tensor

from modeling.batches import step_seed
from modeling.data import LabelledImages
from modeling.device import Compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import sharded
from modeling.images import to_model
from modeling.sampling import SampleNoise
from modeling.signals import poll

SEED = 0  # of the fixed noise: not the run's, so that runs of different seeds are compared on the same noise


def held_out_timesteps(num_images: int, num_timesteps: int) -> Tensor:
    """int64 [N] in [0, T): the time step of each image, evenly spread and shuffled."""
    spread = (torch.arange(num_images) * num_timesteps + num_timesteps // 2) // num_images
    generator = torch.Generator().manual_seed(step_seed(SEED, "held-out", num_images))
    return spread.clamp(max=num_timesteps - 1)[torch.randperm(num_images, generator=generator)]


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
    """The loss of each held-out image. Several processes take a share each, and all of them must call this.

    Args:
        model: in eval mode, on the device.
        data: never trained on; the labels serve a class-conditional model.
        batch_size: changes nothing but memory.
        compute: where, and in which precision.

    Returns:
        float32 [N], the losses, and int64 [N], the time steps, both on the CPU.
    """
    t = held_out_timesteps(len(data.images), model.schedule.num_timesteps)

    def work(mine: range) -> Tensor:
        losses = [torch.empty(0)]
        for start in range(mine.start, mine.stop, batch_size):
            poll()
            indices = range(start, min(start + batch_size, mine.stop))
            x_0, y = model_inputs(model, data, indices, compute)
            noise = SampleNoise(SEED, indices, x_0.shape[1:], "cpu")().to(compute.device)
            with compute.autocast():
                loss = model.simple_loss(x_0, t[start : indices.stop].to(compute.device), noise, y)
            losses.append(loss.float().cpu())
        return torch.cat(losses)

    return sharded(len(data.images), work), t
