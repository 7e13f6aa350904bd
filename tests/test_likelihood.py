"""The variational bound against integrals and closed forms."""

import math

import pytest
import torch
from conftest import optimal_model

from modeling.likelihood import bound_term, discretised_gaussian_log_likelihood, normal_kl, prior_term
from modeling.schedule import NoiseSchedule, linear_betas


def test_normal_kl_against_torch(generator):
    m1, m2 = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    v1, v2 = torch.rand(2, 100, generator=generator, dtype=torch.float64) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, v1.sqrt()), torch.distributions.Normal(m2, v2.sqrt())
    )
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), expected)


@pytest.mark.parametrize("std", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.999])
def test_decoder_sums_to_one_and_is_the_integral(std, mean):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_mass = discretised_gaussian_log_likelihood(
        levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    )
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-12)
    k = min(max(round((mean + 1) * 127.5), 1), 254)
    inner = torch.linspace(levels[k] - 1 / 255, levels[k] + 1 / 255, 20_001, dtype=torch.float64)
    density = torch.exp(-(((inner - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    assert log_mass[k].exp().item() == pytest.approx(torch.trapezoid(density, inner).item(), rel=1e-6)


def test_decoder_is_finite_in_the_far_tail():
    log_mass = discretised_gaussian_log_likelihood(torch.tensor([1.0, 0.0]), torch.tensor(-1.0), torch.tensor(0.01))
    assert bool(torch.isfinite(log_mass).all()) and log_mass[0] < -15_000


def test_prior_term(schedule):
    x_0 = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    a = schedule.alphas_cumprod[-1].item()
    expected = 0.5 * ((1 - a) - 1 - math.log(1 - a) + a * 0.25) / math.log(2)
    term = prior_term(optimal_model(schedule, lambda x, _: x), x_0)
    assert term.tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_for_the_optimal_eps_of_a_standard_normal(variance, generator):
    """Data N(0, 1), eps* = sqrt(1 - alphas_cumprod) x_t: every term's expectation has a closed form."""
    schedule = NoiseSchedule(linear_betas(20, 0.01, 0.3))
    model = optimal_model(schedule, lambda x, a: a.sqrt() * x, variance)
    n = 40_000
    x_0 = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    for step in (1, 7, 19):
        t = torch.full((n,), step)
        term, error = bound_term(model, x_0, t, noise, clip_denoised=False)
        a, v = schedule.alphas_cumprod[step].item(), schedule.posterior_variance[step].item()
        v_p = schedule.betas[step].item() if variance == "fixed_large" else v
        mean_error = schedule.posterior_mean_coef1[step].item() ** 2 * (1 - a)  # Var(x_0 | x_t) = 1 - a
        expected = 0.5 * (v / v_p - 1 - math.log(v / v_p) + mean_error / v_p) / math.log(2)
        assert term.mean().item() == pytest.approx(expected, rel=0.03)
        assert error.mean().item() == pytest.approx(a, rel=0.03)  # E|eps - eps*|^2 = alphas_cumprod


def test_a_perfect_model_pays_nothing_but_the_decoder(schedule, generator):
    levels = torch.randint(0, 256, (4, 1, 2, 2), generator=generator).double() / 127.5 - 1
    model = optimal_model(schedule, lambda x, _: levels, "fixed_small")
    noise = torch.randn(levels.shape, generator=generator, dtype=torch.float64)
    for step in range(1, schedule.num_timesteps, 3):
        term, error = bound_term(model, levels, torch.full((4,), step), noise)
        assert term.abs().max() < 1e-8 and error.max() < 1e-12
    decoder, _ = bound_term(model, levels, torch.zeros(4, dtype=torch.int64), noise)
    std = model.reverse_variance(torch.tensor([0]), levels).sqrt()
    expected = -discretised_gaussian_log_likelihood(levels, levels, std).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(decoder, expected)


def test_reverse_variance(schedule):
    like = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0, schedule.num_timesteps - 1])
    for variance, last in (("fixed_large", schedule.betas[-1]), ("fixed_small", schedule.posterior_variance[-1])):
        got = optimal_model(schedule, lambda x, _: x, variance).reverse_variance(t, like).flatten()
        torch.testing.assert_close(got, torch.stack([schedule.posterior_variance[1], last]))
    one = optimal_model(NoiseSchedule(torch.tensor([0.3])), lambda x, _: x)
    assert one.reverse_variance(torch.tensor([0]), like).flatten().tolist() == pytest.approx([0.3])
