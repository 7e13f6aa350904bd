"""Gaussians: the pieces that the terms of the variational bound are made of. Pure functions, in nats.

Ho et al. 2020: the KL divergences of equation 5 and the discretised decoder of equation 13, over the 256 levels of a
pixel. How the terms are put together is DiffusionModel's; which images and how many is chosen in evaluation.py.
"""

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) of each element; shapes broadcast."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log of the mass of N(mean, std^2) in the pixel level of x_0.

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
