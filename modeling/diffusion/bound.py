"""The terms of the variational bound, as pure functions of Gaussians.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239): the KL divergences of equation 5 and the discretised decoder of
equation 13, over the 256 levels of a pixel.
"""

import math

import torch
from torch import Tensor

from modeling.diffusion.schedule import NoiseSchedule, gather


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) of each element, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log of the mass of N(mean, std^2) in the pixel level of x_0, in nats.

    Args:
        x_0: in [-1, 1], on the 256 levels that uint8 images have there; the outer levels reach to infinity.
        mean: broadcasts against x_0.
        std: positive, broadcasts against x_0.
    """
    half = 1 / 255
    upper, lower = (x_0 + half - mean) / std, (x_0 - half - mean) / std
    upper = torch.where(x_0 > 1 - half, math.inf, upper)
    lower = torch.where(x_0 < -1 + half, -math.inf, lower)
    # log(Phi(b) - Phi(a)) through the tail that both lie in: the difference of two numbers near 1 has no digits.
    flip = lower + upper > 0
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    log_mass: Tensor = log_b + torch.log1p(-torch.exp((log_a - log_b).clamp(max=-1e-12)))
    return log_mass


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, [N], in bits a dimension."""
    t = torch.full((len(x_0),), schedule.num_timesteps - 1, device=x_0.device)
    mean = gather(schedule.sqrt_alphas_cumprod, t, x_0) * x_0
    log_variance = gather((1 - schedule.alphas_cumprod).log(), t, x_0)
    return _bits(normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(log_variance)))


def step_term(x_0: Tensor, posterior: tuple[Tensor, Tensor], mean: Tensor, log_variance: Tensor) -> Tensor:
    """L_{t-1} of each image, [N], in bits a dimension; where the posterior has no variance (t = 0), the decoder's L_0.

    Args:
        x_0: [N, C, H, W] in [-1, 1].
        posterior: mean and variance of q(x_{t-1} | x_t, x_0).
        mean: of the reverse step p(x_{t-1} | x_t), [N, C, H, W].
        log_variance: of the reverse step; broadcasts against the mean.
    """
    true_mean, true_variance = posterior
    decoder = -discretised_gaussian_log_likelihood(x_0, mean, torch.exp(0.5 * log_variance))
    # Where the variance is 0 it is replaced only to keep the unused branch finite.
    true_log_variance = torch.where(true_variance > 0, true_variance, 1.0).log()
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    return _bits(torch.where(true_variance > 0, kl, decoder))


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
