"""The variational bound on the negative log-likelihood, in bits a dimension, term by term.

Ho et al. 2020, equation 5: L_T (the prior), L_{t-1} (one for each reverse step) and L_0 (a discretised Gaussian
decoder, equation 13, over the 256 levels of a pixel). The sum bounds the code length of an image from above. The caller
passes the noise; which images and how many are chosen in evaluation.py.
"""

import math

import torch
from torch import Tensor

from modeling.diffusion import DiffusionModel
from modeling.schedule import gather


def normal_kl(mean1: Tensor, variance1: Tensor, mean2: Tensor, variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) of each element, in nats; shapes broadcast."""
    ratio = variance1 / variance2
    return 0.5 * (ratio - 1 - ratio.log() + (mean1 - mean2).square() / variance2)


def discretised_gaussian_log_likelihood(x_0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log of the mass of N(mean, std^2) in the pixel level of x_0 (Ho et al. 2020, equation 13), in nats.

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


def prior_term(model: DiffusionModel, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, [N], in bits a dimension."""
    s = model.schedule
    t = torch.full((len(x_0),), s.num_timesteps - 1, device=x_0.device)
    mean = gather(s.sqrt_alphas_cumprod, t, x_0) * x_0
    variance = 1 - gather(s.alphas_cumprod, t, x_0)
    return _bits(normal_kl(mean, variance, torch.zeros_like(mean), torch.ones_like(variance)))


@torch.no_grad()
def bound_term(
    model: DiffusionModel, x_0: Tensor, t: Tensor, noise: Tensor, clip_denoised: bool = True
) -> tuple[Tensor, Tensor]:
    """One term of the bound at time step t: L_{t-1} for t > 0 and the decoder's L_0 for t = 0.

    Args:
        model: in eval mode.
        x_0: [N, C, H, W] in [-1, 1].
        t: [N].
        noise: [N, C, H, W], from N(0, I).
        clip_denoised: clip the predicted x_0, as the samplers do.

    Returns:
        The term and the squared error of the predicted noise (unclipped), both [N]; the term in bits a dimension.
    """
    x_t = model.q_sample(x_0, t, noise)
    raw = model.predict(x_t, t, clip_denoised=False)
    predicted = raw.x_0.clamp(-1, 1) if clip_denoised else raw.x_0
    mean, _ = model.q_posterior(predicted, x_t, t)
    true_mean, true_variance = model.q_posterior(x_0, x_t, t)
    variance = model.reverse_variance(t, x_0)
    decoder = -discretised_gaussian_log_likelihood(x_0, mean, variance.sqrt())
    # At t = 0 the posterior is a point mass; its variance is replaced only to keep the unused branch finite.
    kl = normal_kl(true_mean, torch.where(true_variance > 0, true_variance, variance), mean, variance)
    term = torch.where((t == 0).reshape(-1, 1, 1, 1), decoder, kl)
    return _bits(term), (raw.eps - noise).square().flatten(1).mean(1)


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
