"""Closed-form networks, shared by the tests of the mathematics."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modeling.diffusion import DiffusionModel
from modeling.schedule import NoiseSchedule, cosine_betas, linear_betas


class OptimalEps(nn.Module):
    """The optimal noise prediction for a data distribution whose denoiser E[x_0 | x_t] is known."""

    def __init__(self, schedule: NoiseSchedule, denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.schedule = schedule
        self.denoise = denoise

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_0 = self.denoise(x_t, alpha_bar)
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def optimal_model(
    schedule: NoiseSchedule, denoise: Callable[[Tensor, Tensor], Tensor], variance: str = "fixed_large"
) -> DiffusionModel:
    return DiffusionModel(OptimalEps(schedule, denoise), schedule, variance=variance)


@pytest.fixture(params=["linear", "cosine", "short"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    betas = {
        "linear": linear_betas(1000, 1e-4, 0.02),
        "cosine": cosine_betas(100),
        "short": linear_betas(7, 0.05, 0.6),
    }
    return NoiseSchedule(betas[request.param])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
