"""NoiseSchedule against recursions and Bayes' rule, for every schedule of the registry; each schedule's formula."""

import math

import pytest
import torch

from modeling.diffusion.schedule import (
    NoiseSchedule,
    cosine_betas,
    linear_betas,
    linear_scaled_betas,
    sigmoid_betas,
    tabulated_betas,
)


def test_linear_betas_of_the_paper():
    betas = linear_betas(1000, 1e-4, 0.02)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    torch.testing.assert_close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))
    # Its twenty first steps do not reach noise.
    assert NoiseSchedule(linear_betas(20, 1e-4, 0.02)).alphas_cumprod[-1].item() == pytest.approx(0.817, abs=1e-3)


@pytest.mark.parametrize("num_timesteps", [25, 100, 1000, 4000])
def test_scaled_linear_betas_reach_noise_in_any_number_of_steps(num_timesteps):
    betas = linear_scaled_betas(num_timesteps, 1e-4, 0.02)
    torch.testing.assert_close(betas * num_timesteps / 1000, linear_betas(num_timesteps, 1e-4, 0.02))
    assert betas.sum().item() == pytest.approx(1000 * (1e-4 + 0.02) / 2)  # the same noise, in other steps
    assert NoiseSchedule(betas).alphas_cumprod[-1] < 1e-4


def test_cosine_schedule_is_the_squared_cosine():
    schedule = NoiseSchedule(cosine_betas(50))
    f = torch.cos((torch.arange(50, dtype=torch.float64) / 50 + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], f[1:] / f[0])
    assert schedule.betas[-1] == 0.999  # clipped


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 0.5), (-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)])
def test_sigmoid_schedule_is_the_rescaled_sigmoid(start, end, tau):
    schedule = NoiseSchedule(sigmoid_betas(50, start, end, tau))
    u = torch.arange(51, dtype=torch.float64) / 50
    f = 1 / (1 + torch.exp((start + (end - start) * u) / tau))
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], ((f - f[-1]) / (f[0] - f[-1]))[1:-1])
    assert schedule.betas[-1] == 0.999
    assert start == 0 or schedule.alphas_cumprod[24].item() == pytest.approx(0.5)


def test_variance_recursion(schedule):
    """Single steps add up: the signal that survives them all, and the variance that they leave."""
    assert schedule.betas.dtype == torch.float64 and bool(((schedule.betas > 0) & (schedule.betas < 1)).all())
    signal, variance = 1.0, 0.0
    for beta, alpha_bar in zip(schedule.betas.tolist(), schedule.alphas_cumprod.tolist(), strict=True):
        signal, variance = (1 - beta) ** 0.5 * signal, (1 - beta) * variance + beta
        assert variance == pytest.approx(1 - alpha_bar, rel=1e-10) and signal**2 == pytest.approx(alpha_bar, rel=1e-10)


def test_posterior_is_bayes_rule_for_two_gaussians(schedule):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    s, betas, before = schedule, schedule.betas[1:], schedule.alphas_cumprod_prev[1:]
    precision = (1 - betas) / betas + 1 / (1 - before)
    torch.testing.assert_close(s.posterior_variance[1:], 1 / precision)
    torch.testing.assert_close(s.posterior_mean_coef2[1:], (1 - betas).sqrt() / betas / precision)
    torch.testing.assert_close(s.posterior_mean_coef1[1:], before.sqrt() / (1 - before) / precision)


def test_a_table_has_a_beta_for_each_time_step():
    assert tabulated_betas(2, [0.1, 0.2]).tolist() == [0.1, 0.2]
    with pytest.raises(ValueError, match="2 betas for 3 time steps"):
        tabulated_betas(3, [0.1, 0.2])


def test_posterior_at_the_first_step_is_x_0(schedule):
    assert schedule.posterior_mean_coef1[0].item() == pytest.approx(1, abs=1e-12)
    assert schedule.posterior_mean_coef2[0] == 0 and schedule.posterior_variance[0] == 0


def test_the_arithmetic_is_in_float64():
    assert NoiseSchedule(torch.tensor([0.1, 0.2])).alphas_cumprod.dtype == torch.float64


def test_constants_are_not_saved_and_move_with_the_module(schedule):
    assert schedule.state_dict() == {}
    assert schedule.to("meta").betas.device.type == "meta"


NOTHING_LEFT = "nothing of the image or no noise is left"
BAD = [
    ([], "betas must be"),
    ([0.1, 0.0], "betas must be"),
    ([0.5, 1.0], "betas must be"),
    ([math.nan], "betas must be"),
]
BAD += [(linear_betas(1000, 0.1, 0.99).tolist(), NOTHING_LEFT), ([1e-17], NOTHING_LEFT)]


@pytest.mark.parametrize(("betas", "message"), BAD)
def test_bad_betas_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
