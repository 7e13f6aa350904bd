"""Samplers: free functions that turn noise x_T into images with a trained DiffusionModel.

Ancestral DDPM (Ho et al. 2020, algorithm 2), DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12) and
DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2), all on any subsequence of the time
steps. Coefficients are computed once a step, in float64. Noise comes from a function, so that sample k draws the same
numbers in any batch: see SampleNoise. Which samples, and in what batches, is chosen in drawing.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from modeling.diffusion import Prediction
from modeling.schedule import NoiseSchedule
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


class Denoiser(Protocol):
    """What a sampler needs: a DiffusionModel, or one that is guided (see guidance.py)."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def variance(self) -> str: ...

    def predict(self, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Prediction: ...


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


def _alphas_cumprod_pairs(model: Denoiser, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alphas_cumprod at t, alphas_cumprod at the step after it in the sequence; 1 behind the last)."""
    table = model.schedule.alphas_cumprod.tolist()
    following = [table[t] for t in timesteps[1:]] + [1.0]
    return [(t, table[t], prev) for t, prev in zip(timesteps, following, strict=True)]


@torch.no_grad()
def ddpm_sample(
    model: Denoiser, x_T: Tensor, timesteps: Sequence[int], noise_fn: NoiseFn, clip_denoised: bool = True
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
        x_0, _, fraction = model.predict(x, _full(x, t), clip_denoised)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        coef1 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
        coef2 = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x = coef1 * x_0 + coef2 * x
        if t != timesteps[-1]:
            small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            if fraction is not None:  # the learned variance, between the two in the logarithm
                std = torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(small)))
                x = x + std * noise_fn()
            else:
                x = x + math.sqrt(beta if model.variance == "fixed_large" else small) * noise_fn()
    return x


@torch.no_grad()
def ddim_sample(
    model: Denoiser,
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
        x_0, eps, _ = model.predict(x, _full(x, t), clip_denoised)
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        x = math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(max(1 - alpha_bar_prev - variance, 0.0)) * eps
        if eta > 0 and t != timesteps[-1]:
            x = x + math.sqrt(variance) * noise_fn()
    return x


@torch.no_grad()
def dpm_solver_sample(model: Denoiser, x_T: Tensor, timesteps: Sequence[int], clip_denoised: bool = True) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): a second-order multistep solver of the same ODE as DDIM.

    The first step and the last (to the clean image) are of first order, which is a step of DDIM.

    Args:
        model: in eval mode.
        x_T: [N, C, H, W], from N(0, I).
        timesteps: descending.
        clip_denoised: clip the predicted x_0 to [-1, 1].

    Returns:
        x_0, [N, C, H, W], nominally in [-1, 1].
    """
    x = x_T
    earlier: tuple[Tensor, float] | None = None  # the last predicted x_0, and the log-SNR half-step that led here
    for t, alpha_bar, alpha_bar_prev in _alphas_cumprod_pairs(model, timesteps)[:-1]:
        poll()
        x_0 = model.predict(x, _full(x, t), clip_denoised).x_0
        lam, lam_next = _half_log_snr(alpha_bar), _half_log_snr(alpha_bar_prev)
        h = lam_next - lam
        direction = x_0
        if earlier is not None:
            previous, h_before = earlier
            ratio = h / (2 * h_before)
            direction = (1 + ratio) * x_0 - ratio * previous
        earlier = x_0, h
        x = (
            math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * x
            - math.sqrt(alpha_bar_prev) * math.expm1(-h) * direction
        )
    poll()
    return model.predict(x, _full(x, timesteps[-1]), clip_denoised).x_0


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)
