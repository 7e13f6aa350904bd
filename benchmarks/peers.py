"""The peers, from their released packages, each in the way its users run it.

diffusers: the loop of its unconditional training example. denoising-diffusion-pytorch: the loop of its Trainer. plain:
what most course projects write: this project's network in float32 with the upsampling written out, torchvision's
DataLoader over PIL images, Adam as it comes, an EMA parameter by parameter, `.item()` at every step. All of them train
with Adam, clip the gradient and keep an EMA. They run in a process of their own: see measure.Elsewhere.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measure import Contestant
from benchmarks.project import Task
from modeling.diffusion.schedule import linear_betas
from modeling.diffusion.unet import Upsample
from modeling.interop.weight_names import to_diffusers


class PILImages(Dataset[Tensor]):
    """As torchvision's CIFAR10 does: a PIL image made from a row of an array, then the transforms."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = self.transform(Image.fromarray(self.images[index]))
        return tensor


USUAL = (transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]))


def batches(images: Any, batch_size: int, steps: tuple[Any, ...] = USUAL, workers: int = 0) -> Iterator[Tensor]:
    """torchvision's way, for ever: float32 [N, C, H, W] in [-1, 1]."""
    dataset = PILImages(images, transforms.Compose(steps))
    pin = workers > 0 and torch.cuda.is_available()
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,  # these epochs are short: their start would be most of what is measured
    )
    while True:
        yield from loader


def loading(task: Task) -> Contestant:
    """The batches alone."""
    n = task.config.trainer.batch_size
    source = batches(task.images, n)

    def work() -> float:
        next(source)
        return n

    return work


def optimizer_of(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """The same Adam as this project's, but as it comes: not fused."""
    o = task.config.optimizer
    return torch.optim.Adam(model.parameters(), o.lr)


def diffusers_unet(task: Task) -> Any:
    """diffusers' UNet2DModel in the architecture of the task's UNet."""
    from diffusers import UNet2DModel

    m, (channels, size, _) = task.config.model, task.shape
    attends = [size >> level in m.attention_resolutions for level in range(len(m.channel_mult))]
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(m.model_channels * mult for mult in m.channel_mult),
        layers_per_block=m.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=None,  # one head
        norm_num_groups=m.norm_groups,
        norm_eps=1e-6,
        dropout=m.dropout,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ).to(task.compute.device)


def copy_weights(task: Task, ours: nn.Module, theirs: Any) -> None:
    """Gives diffusers' network the weights of ours."""
    m = task.config.model
    weights = {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(to_diffusers(weights, len(m.channel_mult), m.num_res_blocks))


def diffusers_training(task: Task, bf16: bool = False, compiled: bool = False) -> Contestant:
    """The loop of its unconditional training example; `bf16` is its --mixed_precision bf16."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    device, size = task.compute.device, task.shape[1]
    model = diffusers_unet(task).train()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    ema.to(device)
    called = torch.compile(model) if compiled else model
    scheduler = DDPMScheduler(task.config.diffusion.num_timesteps, beta_schedule="linear")
    optimizer = optimizer_of(task, model)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    n = task.config.trainer.batch_size
    prepare = (transforms.Resize(size), transforms.CenterCrop(size), *USUAL)
    source = batches(task.images, n, prepare)

    def work() -> float:
        clean = next(source).to(device)
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (n,), device=device).long()
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = called(noisy, t).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()
        return n

    return work


def ddpm_pytorch_training(task: Task, bf16: bool = False) -> Contestant:
    """The loop of denoising-diffusion-pytorch's Trainer; its UNet is its own, of the same width and depth of levels."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    device, m, (_, size, _) = task.compute.device, task.config.model, task.shape
    network = Unet(m.model_channels, dim_mults=tuple(m.channel_mult), dropout=m.dropout, flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=size, timesteps=task.config.diffusion.num_timesteps)
    diffusion = diffusion.to(device).train()
    optimizer = optimizer_of(task, diffusion)
    ema = EMA(diffusion, beta=0.995, update_every=10).to(device)
    n = task.config.trainer.batch_size
    prepare = (
        transforms.Resize(size),
        transforms.RandomHorizontalFlip(),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
    )
    source = batches(task.images, n, prepare, workers=os.cpu_count() or 1)

    def work() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = diffusion(next(source).to(device))
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return n

    return work


class PlainUpsample(Upsample):
    """As in its definition: the larger picture is made, and then convolved."""

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.conv = conv

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """See Upsample."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def plain_training(task: Task) -> Contestant:
    """What most course projects write."""
    device = task.compute.device
    network = task.model().network.to(memory_format=torch.contiguous_format).train()
    average = copy.deepcopy(network)
    for position, layer in enumerate(network.up):
        if isinstance(layer, Upsample):
            network.up[position] = PlainUpsample(layer.conv)
    optimizer = optimizer_of(task, network)
    steps = task.config.diffusion.num_timesteps
    alphas_cumprod = (1 - linear_betas(steps, 1e-4, 0.02)).cumprod(0).float().to(device)
    n = task.config.trainer.batch_size
    source = batches(task.images, n)

    def work() -> float:
        x_0 = next(source).to(device)
        t = torch.randint(0, steps, (n,), device=device)
        noise = torch.randn_like(x_0)
        signal = alphas_cumprod[t][:, None, None, None]
        loss = F.mse_loss(network(signal.sqrt() * x_0 + (1 - signal).sqrt() * noise, t), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.mul_(0.9999).add_(new, alpha=0.0001)
        loss.item()
        return n

    return work


def diffusers_sampling(task: Task, name: str, steps: int, batch_size: int) -> Contestant:
    """A diffusers pipeline with the task's weights, as it comes: float32. Returns network evaluations times images."""
    import diffusers

    unet = diffusers_unet(task).eval()
    copy_weights(task, task.model().network, unet)
    total = task.config.diffusion.num_timesteps
    kinds = {
        "ddpm": (diffusers.DDPMPipeline, diffusers.DDPMScheduler),
        "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler),
        # Its DPM-Solver++ has no unconditional pipeline of its own; DDPMPipeline takes any scheduler.
        "dpm_solver": (diffusers.DDPMPipeline, diffusers.DPMSolverMultistepScheduler),
    }
    pipeline_class, scheduler_class = kinds[name]
    pipeline = pipeline_class(unet=unet, scheduler=scheduler_class(total, beta_schedule="linear"))
    pipeline.to(task.compute.device)
    pipeline.set_progress_bar_config(disable=True)

    def work() -> float:
        pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np")
        return float(steps * batch_size)

    return work
