"""Closed-form networks for the tests of the mathematics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.samplers import SAMPLERS
from modeling.diffusion.schedule import NoiseSchedule


class Optimal(nn.Module):
    """The optimal prediction for data whose denoiser E[x_0 | x_t] is known; a learned variance is beta."""

    def __init__(
        self, schedule: NoiseSchedule, denoise: Callable[[Tensor, Tensor], Tensor], prediction_type: str, learned: bool
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.denoise = denoise
        self.prediction_type = prediction_type
        self.learned = learned

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_0 = self.denoise(x_t, alpha_bar)
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        out = {"epsilon": eps, "sample": x_0, "v_prediction": v}[self.prediction_type]
        return torch.cat([out, torch.ones_like(out)], dim=1) if self.learned else out


def optimal_model(
    schedule: NoiseSchedule,
    denoise: Callable[[Tensor, Tensor], Tensor],
    variance: str = "fixed_large",
    prediction_type: str = "epsilon",
) -> DiffusionModel:
    network = Optimal(schedule, denoise, prediction_type, variance == "learned")
    return DiffusionModel(network, schedule, prediction_type, variance)


def sample(name, model, x_T, timesteps, noise_fn=None, clip_denoised=True, **options):
    """Runs a sampler of the registry on a model; without a `noise_fn`, with noise of seed 1."""
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype)

    def predict(x_t, t):
        return model.predict(x_t, t, clip_denoised)

    return SAMPLERS[name](predict, x_T, timesteps, model.schedule.alphas_cumprod, noise_fn or noise, **options)
