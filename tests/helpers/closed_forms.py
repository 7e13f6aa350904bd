"""Closed-form networks and samplers on them, for the tests of the mathematics."""

import torch

from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.samplers import SAMPLERS


def output_for(x_0, x_t, alpha_bar, prediction_type):
    """What a network puts out whose estimate of the clean image is x_0."""
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    return {"epsilon": eps, "sample": x_0, "v_prediction": v}[prediction_type]


def optimal_model(schedule, denoise, variance="fixed_large", prediction_type="epsilon", fraction=1.0):
    """The optimum for data with E[x_0 | x_t] = denoise(x_t, alpha_bar); a learned variance is at `fraction`."""

    def network(x_t, t):
        alpha_bar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        out = output_for(denoise(x_t, alpha_bar), x_t, alpha_bar, prediction_type)
        return torch.cat([out, torch.full_like(out, 2 * fraction - 1)], dim=1) if variance == "learned" else out

    return DiffusionModel(network, schedule, prediction_type, variance)


def squashed(x_t, alpha_bar):
    """A denoiser that is not linear."""
    return torch.tanh(x_t) * alpha_bar


def sample(name, model, x_T, timesteps, noise_fn=None, clip_denoised=True, **options):
    """Runs a sampler of the registry on a model; without a `noise_fn`, with noise of seed 1."""
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype)

    def predict(x_t, t):
        return model.predict(x_t, t, clip_denoised)

    return SAMPLERS[name](predict, x_T, timesteps, model.schedule.alphas_cumprod, noise_fn or noise, **options)
