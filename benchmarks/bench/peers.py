"""The peers, from their released packages, each in the way its users run it.

diffusers: the loop of its unconditional training example. denoising-diffusion-pytorch: the loop of its Trainer. plain:
what most course projects write: this project's network in float32 with the upsampling written out, torchvision's
DataLoader over PIL images, Adam with its defaults, an EMA parameter by parameter, `.item()` at every step. All of them
train with Adam, clip the gradient and keep an EMA. They run in a process of their own: see measure.Elsewhere.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measure import Contestant
from benchmarks.project import Task
from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.schedule import linear_betas
from modeling.diffusion.unet import Upsample
from modeling.interop.diffusers import save_diffusers

USUAL = (transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]))


class PILImages(Dataset[Tensor]):
    """As torchvision's CIFAR10 does: a PIL image made from a row of an array, then the transforms."""

    def __init__(self, images: Any, *steps: Any) -> None:
        self.images, self.transform = images, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index]))


def batches(task: Task, steps: tuple[Any, ...] = USUAL, workers: int = 0) -> Iterator[Tensor]:
    """torchvision's way, without end: float32 [N, C, H, W] in [-1, 1]."""
    loader = DataLoader(
        PILImages(task.images, *steps),
        task.config.trainer.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        persistent_workers=workers > 0,  # these epochs are short: their start would be most of what is measured
    )
    while True:
        yield from loader


def loading(task: Task) -> Contestant:
    """The batches alone."""
    source = batches(task)
    return lambda: float(len(next(source)))


def training(
    task: Task,
    model: nn.Module,
    source: Iterator[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Any],
) -> Contestant:
    """Steps of a training loop with Adam, not fused, as this project's but for that: the part that all peers share.

    Args:
        loss_of: from a batch on the device.
        after: called with the loss after the optimizer's step.
    """
    optimizer = torch.optim.Adam(model.parameters(), task.config.optimizer.lr)

    def work() -> float:
        clean = next(source).to(task.compute.device)
        loss = loss_of(clean)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after(loss)
        return len(clean)

    return work


def diffusers_unet(task: Task, model: DiffusionModel) -> Any:
    """A model of the task as diffusers' UNet2DModel, by the way of stage=export."""
    from diffusers import UNet2DModel

    c = task.config
    meta = {
        "config": {"model": asdict(c.model), "diffusion": asdict(c.diffusion)},
        "image_shape": task.shape,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(Path(folder), model.network.state_dict(), model.schedule.betas, meta)
        return UNet2DModel.from_pretrained(f"{folder}/unet").to(task.compute.device)


def diffusers_training(task: Task, bf16: bool = False, compiled: bool = False) -> Contestant:
    """The loop of its unconditional training example; `bf16` is its --mixed_precision bf16."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    device, size = task.compute.device, task.shape[1]
    model = diffusers_unet(task, task.model()).train()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    ema.to(device)
    called = torch.compile(model) if compiled else model
    total = task.config.diffusion.num_timesteps
    scheduler = DDPMScheduler(total, beta_schedule="linear")

    def loss_of(clean: Tensor) -> Tensor:
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, total, (len(clean),), device=device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = called(noisy, t).sample
        return F.mse_loss(output.float(), noise.float())

    def after(loss: Tensor) -> None:
        ema.step(model.parameters())
        loss.detach().item()

    source = batches(task, (transforms.Resize(size), transforms.CenterCrop(size), *USUAL))
    return training(task, model, source, loss_of, after)


def ddpm_pytorch_training(task: Task, bf16: bool = False) -> Contestant:
    """The loop of denoising-diffusion-pytorch's Trainer; its UNet is its own, of the same width and depth of levels."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    device, m, (_, size, _) = task.compute.device, task.config.model, task.shape
    network = Unet(m.model_channels, dim_mults=tuple(m.channel_mult), dropout=m.dropout, flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=size, timesteps=task.config.diffusion.num_timesteps)
    diffusion = diffusion.to(device).train()
    ema = EMA(diffusion, beta=0.995, update_every=10).to(device)
    t = transforms
    prepare = (t.Resize(size), t.RandomHorizontalFlip(), t.CenterCrop(size), t.ToTensor())

    def loss_of(clean: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss: Tensor = diffusion(clean)
        loss.item()
        return loss

    source = batches(task, prepare, workers=os.cpu_count() or 1)
    return training(task, diffusion, source, loss_of, lambda _: ema.update())


class PlainUpsample(Upsample):
    """As in its definition: the larger picture is made, and then convolved."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """See Upsample."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def plain_training(task: Task) -> Contestant:
    """What most course projects write."""
    device = task.compute.device
    network = task.model().network.to(memory_format=torch.contiguous_format).train()
    average = copy.deepcopy(network)
    for layer in network.up:
        if isinstance(layer, Upsample):
            layer.__class__ = PlainUpsample
    total = task.config.diffusion.num_timesteps
    alphas_cumprod = (1 - linear_betas(total, 1e-4, 0.02)).cumprod(0).float().to(device)

    def loss_of(x_0: Tensor) -> Tensor:
        t = torch.randint(0, total, (len(x_0),), device=device)
        noise = torch.randn_like(x_0)
        signal = alphas_cumprod[t][:, None, None, None]
        return F.mse_loss(network(signal.sqrt() * x_0 + (1 - signal).sqrt() * noise, t), noise)

    def after(loss: Tensor) -> None:
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.mul_(0.9999).add_(new, alpha=0.0001)
        loss.item()

    return training(task, network, batches(task), loss_of, after)


def diffusers_sampling(task: Task, name: str, steps: int, batch_size: int) -> Contestant:
    """diffusers' pipeline with the task's weights and its own defaults, float32; network evaluations times images."""
    import diffusers

    unet = diffusers_unet(task, task.model()).eval()
    kinds = {
        "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
        "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
        # Its DPM-Solver++ has no unconditional pipeline of its own; DDPMPipeline takes any scheduler.
        "dpm_solver": (diffusers.DDPMPipeline, diffusers.DPMSolverMultistepScheduler),
    }
    pipeline_of, scheduler_of = kinds[name]
    scheduler = scheduler_of(task.config.diffusion.num_timesteps, beta_schedule="linear")
    pipeline = pipeline_of(unet=unet, scheduler=scheduler).to(task.compute.device)
    pipeline.set_progress_bar_config(disable=True)

    def work() -> float:
        pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")
        return float(steps * batch_size)

    return work
