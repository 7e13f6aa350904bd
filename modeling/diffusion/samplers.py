"""Samplers: free functions that turn noise x_T into images with a denoiser.

Ancestral DDPM (Ho et al. 2020, algorithm 2), DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12) and
DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2), all on any subsequence of the time
steps. To add a sampler: docs/extending.md. Every sampler takes

    predict: from (x_t [N, C, H, W], t [N]) to a Prediction: DiffusionModel.predict in eval mode with its options bound
    x_T: [N, C, H, W], from N(0, I)
    timesteps: descending, see timestep_subsequence
    alphas_cumprod: float64 [T], of the model's schedule; coefficients are computed from it once a step, in float64
    noise_fn: draws the noise of one step, [N, C, H, W] from N(0, I); never called for the last step

and the sampler's own options, and returns x_0, [N, C, H, W], nominally in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.diffusion.model import Prediction

Predict = Callable[[Tensor, Tensor], Prediction]
NoiseFn = Callable[[], Tensor]


def timestep_subsequence(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` time steps spread evenly over [0, T), descending, with both ends (only T - 1 for a single step)."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"{num_steps} sampling steps: allowed are 1 to {num_timesteps}, the steps of the model")
    last = num_timesteps - 1
    return [last - round(i * last / max(num_steps - 1, 1)) for i in range(num_steps)]


def _pairs(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alphas_cumprod at t, alphas_cumprod at the step after it in the sequence; 1 after the last)."""
    table = alphas_cumprod.tolist()
    following = [table[t] for t in timesteps[1:]] + [1.0]
    return [(t, table[t], prev) for t, prev in zip(timesteps, following, strict=True)]


@torch.no_grad()
def ddpm_sample(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, noise_fn: NoiseFn
) -> Tensor:
    """Ancestral sampling with the model's own variance (Ho et al. 2020, algorithm 2).

    The betas of a subsequence are those between its neighbours.
    """
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps):
        x_0, _, fraction = predict(x, _full(x, t))
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        coef1 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
        coef2 = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x = coef1 * x_0 + coef2 * x
        if t != timesteps[-1]:
            small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            if isinstance(fraction, Tensor):  # learned: between the two in the logarithm
                std = torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(small)))
                x = x + std * noise_fn()
            else:
                x = x + math.sqrt(beta if fraction else small) * noise_fn()
    return x


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    x_T: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
    noise_fn: NoiseFn,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta = 0, ancestral sampling (`fixed_small`) at eta = 1."""
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps):
        x_0, eps, _ = predict(x, _full(x, t))
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        x = math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(max(1 - alpha_bar_prev - variance, 0.0)) * eps
        if eta > 0 and t != timesteps[-1]:
            x = x + math.sqrt(variance) * noise_fn()
    return x


@torch.no_grad()
def dpm_solver_sample(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, noise_fn: NoiseFn
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): a second-order multistep solver of the same ODE as DDIM.

    The first step and the last (to the clean image) are of first order, which is a step of DDIM. It draws no noise.
    """
    x = x_T
    earlier: tuple[Tensor, float] | None = None  # the last predicted x_0, and the log-SNR half-step that led here
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps)[:-1]:
        x_0 = predict(x, _full(x, t)).x_0
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
    return predict(x, _full(x, timesteps[-1])).x_0


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


# By the name in the configuration; a sampler's own keys are its keywords.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm_sample,
    "ddim": ddim_sample,
    "dpm_solver": dpm_solver_sample,
}
