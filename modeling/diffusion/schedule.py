"""Noise schedules of the forward process q, and every constant that is derived from them.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), equations 2, 4 and 7; the cosine schedule is Nichol and Dhariwal 2021
(https://arxiv.org/abs/2102.09672), equation 17, the sigmoid one Jabri et al. 2022 (https://arxiv.org/abs/2212.11972).
`t` is 0-based: t = 0 is one step of noise, t = T - 1 the last. All constants are float64 and are rounded where they are
gathered. No network and no randomness here. To add a schedule: docs/extending.md.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas that grow linearly (Ho et al. 2020, section 4: 1e-4 to 0.02 over T = 1000)."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def linear_scaled_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Linear betas that reach noise for any T: those of T = 1000 times 1000 / T (as in Nichol and Dhariwal's code)."""
    scale = 1000 / num_timesteps
    return linear_betas(num_timesteps, scale * beta_start, scale * beta_end)


def cosine_betas(num_timesteps: int, offset: float = 0.008) -> Tensor:
    """Betas for which alphas_cumprod is a squared cosine (Nichol and Dhariwal 2021, equation 17).

    `offset` keeps the first betas from vanishing.
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _betas(torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2)


def sigmoid_betas(num_timesteps: int, start: float, end: float, tau: float) -> Tensor:
    """Betas for which alphas_cumprod is a sigmoid (Jabri et al. 2022; they use -3 to 3).

    The sigmoid is taken between `start` and `end` and rescaled to fall from 1 to 0; `tau` is its temperature.
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    s = torch.sigmoid(-(start + u * (end - start)) / tau)
    return _betas((s - s[-1]) / (s[0] - s[-1]))


def tabulated_betas(num_timesteps: int, betas: Sequence[float]) -> Tensor:
    """The given betas: of a model from elsewhere whose schedule has no name here.

    Raises:
        ValueError: their number is not `num_timesteps`.
    """
    if len(betas) != num_timesteps:
        raise ValueError(f"{len(betas)} betas for {num_timesteps} time steps")
    return torch.tensor(betas, dtype=torch.float64)


def _betas(alphas_cumprod: Tensor, max_beta: float = 0.999) -> Tensor:
    """The betas of a falling sequence of alphas_cumprod [T + 1]; `max_beta` prevents the singularity at its end."""
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=max_beta)


# By the name in the configuration: from num_timesteps and the schedule's own keys to float64 betas [T].
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "linear_scaled": linear_scaled_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "tabulated": tabulated_betas,
}


class NoiseSchedule(nn.Module):
    """The constants of q(x_t | x_0) and of q(x_{t-1} | x_t, x_0), as float64 buffers of shape [T].

    Args:
        betas: [T], the variances of the forward steps; ValueError unless each lies in (0, 1).
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    snr: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        betas = betas.to(torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a non-empty vector of numbers in (0, 1)")
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        one_minus = 1 - alphas_cumprod
        if not bool(alphas_cumprod.sqrt().float().all() and one_minus.all()):
            raise ValueError("alphas_cumprod comes so near to 0 or 1 that nothing of the image or no noise is left")
        constants = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": one_minus.sqrt(),
            "snr": alphas_cumprod / one_minus,
            # q(x_{t-1} | x_t, x_0), equation 7. At t = 0 it is a point mass on x_0: variance 0, coefficients 1 and 0.
            "posterior_variance": betas * (1 - alphas_cumprod_prev) / one_minus,
            "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / one_minus,
            "posterior_mean_coef2": (1 - alphas_cumprod_prev) * alphas.sqrt() / one_minus,
        }
        for name, value in constants.items():
            # Derived from the configuration, so not part of a saved model.
            self.register_buffer(name, value, persistent=False)

    def table(self) -> Tensor:
        """alphas_cumprod for samplers: float64 [T] on the CPU, also where the device has rounded its constants."""
        return (1 - self.betas.cpu().double()).cumprod(0)

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return len(self.betas)


def gather(constants: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Picks `constants[t]` for each sample: [N, 1, ...] in the dtype and number of dimensions of `like` [N, ...].

    `constants` is a buffer of NoiseSchedule, [T]; `t` is int64 [N] in [0, T).
    """
    return constants[t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
