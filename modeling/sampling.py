"""Samplers: free functions that turn noise x_T into images with a trained DiffusionModel.

Ancestral DDPM (Ho et al. 2020, algorithm 2) and DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12),
both on any subsequence of the time steps. Coefficients are computed once a step, in float64. Noise comes from a
function, so that sample k draws the same numbers in any batch: see SampleNoise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.device import Compute
from modeling.diffusion import DiffusionModel
from modeling.images import to_uint8
from modeling.signals import poll

NoiseFn = Callable[[], Tensor]
"""Draws fresh noise from N(0, I) in the shape of the images, [N, C, H, W]."""


def timestep_subsequence(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` time steps spread evenly over [0, T), descending, with both ends (only T - 1 for a single step).

    Raises:
        ValueError: num_steps is not in [1, num_timesteps].
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"{num_steps} sampling steps: allowed are 1 to {num_timesteps}, the steps of the model")
    last = num_timesteps - 1
    return [last - round(i * last / max(num_steps - 1, 1)) for i in range(num_steps)]


class SampleNoise:
    """Noise in which sample k depends on (seed, k) alone: neither the batch nor the process count changes a picture.

    Args:
        seed: of the whole set of samples.
        indices: the k of each sample in this batch.
        shape: (C, H, W) of one sample.
        device: where the noise is drawn.
    """

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


def _alphas_cumprod_pairs(model: DiffusionModel, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alphas_cumprod at t, alphas_cumprod at the step after it in the sequence; 1 behind the last)."""
    table = model.schedule.alphas_cumprod.tolist()
    following = [table[t] for t in timesteps[1:]] + [1.0]
    return [(t, table[t], prev) for t, prev in zip(timesteps, following, strict=True)]


@torch.no_grad()
def ddpm_sample(
    model: DiffusionModel, x_T: Tensor, timesteps: Sequence[int], noise_fn: NoiseFn, clip_denoised: bool = True
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the model's own `variance`.

    Args:
        model: in eval mode.
        x_T: [N, C, H, W], from N(0, I).
        timesteps: descending; all of them, or a subsequence, whose betas are then those between its neighbours.
        noise_fn: called once for every step but the last.
        clip_denoised: clip the predicted x_0 to [-1, 1].

    Returns:
        x_0, [N, C, H, W], nominally in [-1, 1].
    """
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _alphas_cumprod_pairs(model, timesteps):
        poll()
        x_0 = model.predict(x, _full(x, t), clip_denoised).x_0
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        coef1 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
        coef2 = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x = coef1 * x_0 + coef2 * x
        if t != timesteps[-1]:
            small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            x = x + math.sqrt(beta if model.variance == "fixed_large" else small) * noise_fn()
    return x


@torch.no_grad()
def ddim_sample(
    model: DiffusionModel,
    x_T: Tensor,
    timesteps: Sequence[int],
    noise_fn: NoiseFn,
    eta: float = 0.0,
    clip_denoised: bool = True,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta = 0, ancestral sampling (`fixed_small`) at eta = 1.

    Args:
        model: in eval mode.
        x_T: [N, C, H, W], from N(0, I).
        timesteps: descending.
        noise_fn: called once for every step but the last, and only if eta > 0.
        eta: in [0, 1], the share of noise.
        clip_denoised: clip the predicted x_0 to [-1, 1].

    Returns:
        x_0, [N, C, H, W], nominally in [-1, 1].
    """
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _alphas_cumprod_pairs(model, timesteps):
        poll()
        x_0, eps = model.predict(x, _full(x, t), clip_denoised)
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        x = math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(max(1 - alpha_bar_prev - variance, 0.0)) * eps
        if eta > 0 and t != timesteps[-1]:
            x = x + math.sqrt(variance) * noise_fn()
    return x


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def draw_samples(
    model: DiffusionModel,
    indices: Sequence[int],
    shape: Sequence[int],
    compute: Compute,
    *,
    name: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    clip_denoised: bool = True,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """Samples number `indices`, each a function of (seed, its index) alone.

    Args:
        model: in eval mode, on the device.
        indices: which samples.
        shape: (C, H, W) of one.
        compute: where, and in which precision.
        name: "ddpm" or "ddim".
        steps: NFE, 1 to T.
        eta: of DDIM.
        clip_denoised: clip the predicted x_0 to [-1, 1].
        batch_size: changes nothing but memory.
        seed: of the whole set.

    Returns:
        uint8 [N, C, H, W] on the CPU.

    Raises:
        ValueError: more steps than the model has.
    """
    timesteps = timestep_subsequence(model.schedule.num_timesteps, steps)
    images = []
    for start in range(0, len(indices), batch_size):
        noise = SampleNoise(seed, indices[start : start + batch_size], shape, compute.device)
        with compute.autocast():
            if name == "ddpm":
                x_0 = ddpm_sample(model, noise(), timesteps, noise, clip_denoised)
            else:
                x_0 = ddim_sample(model, noise(), timesteps, noise, eta, clip_denoised)
        images.append(to_uint8(x_0).cpu())
    return torch.cat(images)
