"""Closed-form networks for the tests of the mathematics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling.diffusion.model import DiffusionModel
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
