"""The variational bound against integrals and closed forms."""

import math

import pytest
import torch
from helpers.closed_forms import optimal_model
from helpers.training import CPU
from torch.distributions import Normal, kl_divergence

from modeling.data.prepared import LabelledImages
from modeling.diffusion.bound import discretised_gaussian_log_likelihood, normal_kl, prior_term
from modeling.diffusion.model import VARIANCES
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.evaluation.bits_per_dim import bits_per_dim


def test_normal_kl_against_torch(generator):
    m1, m2 = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    v1, v2 = torch.rand(2, 100, generator=generator, dtype=torch.float64) + 0.1
    expected = kl_divergence(Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt()))
    torch.testing.assert_close(normal_kl(m1, v1.log(), m2, v2.log()), expected)


@pytest.mark.parametrize("std", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.999])
def test_decoder_sums_to_one_and_is_the_integral(std, mean):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    where = torch.tensor([mean, std], dtype=torch.float64)
    log_mass = discretised_gaussian_log_likelihood(levels, *where)
    assert log_mass.exp().sum().item() == pytest.approx(1, abs=1e-12)
    k = min(max(round((mean + 1) * 127.5), 1), 254)
    inner = torch.linspace(levels[k] - 1 / 255, levels[k] + 1 / 255, 20_001, dtype=torch.float64)
    density = Normal(*where).log_prob(inner).exp()
    assert log_mass[k].exp().item() == pytest.approx(torch.trapezoid(density, inner).item(), rel=1e-6)


def test_decoder_is_finite_in_the_far_tail():
    log_mass = discretised_gaussian_log_likelihood(torch.tensor([1.0, 0.0]), torch.tensor(-1.0), torch.tensor(0.01))
    assert bool(torch.isfinite(log_mass).all()) and log_mass[0] < -15_000


def test_prior_term(schedule):
    x_0 = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    a = schedule.alphas_cumprod[-1].item()
    expected = 0.5 * ((1 - a) - 1 - math.log(1 - a) + a * 0.25) / math.log(2)
    assert prior_term(schedule, x_0).tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_for_the_optimal_eps_of_a_standard_normal(variance, generator):
    """Data N(0, 1), eps* = sqrt(1 - alphas_cumprod) x_t: every term's expectation has a closed form."""
    schedule = NoiseSchedule(linear_betas(20, 0.01, 0.3))
    model = optimal_model(schedule, lambda x, a: a.sqrt() * x, variance)
    n = 40_000
    x_0, noise = torch.randn(2, n, 1, 1, 1, generator=generator, dtype=torch.float64)
    for step in (1, 7, 19):
        t = torch.full((n,), step)
        term, error = model.bound_term(x_0, t, noise, clip_denoised=False), model.simple_loss(x_0, t, noise)
        a, v = schedule.alphas_cumprod[step].item(), schedule.posterior_variance[step].item()
        v_p = schedule.betas[step].item() if variance == "fixed_large" else v
        mean_error = schedule.posterior_mean_coef1[step].item() ** 2 * (1 - a)  # Var(x_0 | x_t) = 1 - a
        expected = 0.5 * (v / v_p - 1 - math.log(v / v_p) + mean_error / v_p) / math.log(2)
        assert term.mean().item() == pytest.approx(expected, rel=0.03)
        assert error.mean().item() == pytest.approx(a, rel=0.03)  # E|eps - eps*|^2 = alphas_cumprod


def test_a_perfect_model_pays_nothing_but_the_decoder(schedule, generator):
    t = torch.arange(schedule.num_timesteps)
    levels = torch.randint(0, 256, (len(t), 1, 2, 2), generator=generator).double() / 127.5 - 1
    noise = torch.randn(levels.shape, generator=generator, dtype=torch.float64)
    model = optimal_model(schedule, lambda x, _: levels, "fixed_small")
    terms = model.bound_term(levels, t, noise)
    assert terms[1:].abs().max() < 1e-8 and model.simple_loss(levels, t, noise).max() < 1e-12
    std = torch.exp(0.5 * model.log_variance(t[:1], levels, 0.0))
    expected = -discretised_gaussian_log_likelihood(levels, levels, std).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(terms[0], expected[0])


def test_reverse_variance(schedule):
    like = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0, schedule.num_timesteps - 1])
    for variance, last in (("fixed_large", schedule.betas[-1]), ("fixed_small", schedule.posterior_variance[-1])):
        model = optimal_model(schedule, lambda x, _: x, variance)
        fraction = model.predict(like, t).fraction
        got = model.log_variance(t, like, fraction).exp().flatten()
        torch.testing.assert_close(got, torch.stack([schedule.posterior_variance[1], last]))
    one = optimal_model(NoiseSchedule(torch.tensor([0.3])), lambda x, _: x)
    assert one.log_variance(torch.tensor([0]), like, 1.0).exp().flatten().tolist() == pytest.approx([0.3])


def test_learned_variance_lies_between_the_two_in_the_logarithm(schedule):
    model = optimal_model(schedule, lambda x, _: x, "learned")
    like, t = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.tensor([schedule.num_timesteps // 2])
    small, large = schedule.posterior_variance[t].item(), schedule.betas[t].item()
    for fraction in (0.0, 0.25, 1.0):
        got = model.log_variance(t, like, torch.full_like(like, fraction)).exp().item()
        assert got == pytest.approx(large**fraction * small ** (1 - fraction))


def gaussian_bound(schedule, s2, variance):
    """The bound in nats of pixels from N(0, s2) under the optimal eps, in closed form; the decoder as a density."""
    a, v = schedule.alphas_cumprod, schedule.posterior_variance
    v_p = (v if variance == "fixed_small" else schedule.betas).clone()
    if variance != "learned":
        v_p[0] = v[1]
    mmse = s2 * (1 - a) / (a * s2 + 1 - a)  # E (x_0 - E[x_0 | x_t])^2
    prior = 0.5 * ((1 - a[-1]) - 1 - (1 - a[-1]).log() + a[-1] * s2)
    error = schedule.posterior_mean_coef1**2 * mmse / v_p
    middle = (0.5 * (v / v_p - 1 - (v / v_p).log() + error))[1:].sum()
    decoder = 0.5 * (2 * math.pi * v_p[0]).log() + mmse[0] / (2 * v_p[0])
    return prior.item(), middle.item(), decoder.item()


S = 0.25  # standard deviation of the data: few pixels reach the ends of [-1, 1]
WIDTH = math.log2(255 / 2)  # what it costs to tell a pixel to within one of its levels, in bits


def schedule_of(num_timesteps):
    return NoiseSchedule(linear_betas(num_timesteps, 0.1 / num_timesteps, 20 / num_timesteps))


def measured_bound(schedule, variance, generator):
    """By evaluation.bits_per_dim, on uint8 images; the learned variance predicts beta."""
    pixels = torch.randn(750, 1, 8, 8, generator=generator, dtype=torch.float64) * S
    images = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    data = LabelledImages(images, torch.zeros(750, dtype=torch.int64))
    model = optimal_model(schedule, lambda x, a: a.sqrt() * S**2 / (a * S**2 + 1 - a) * x, variance)
    return bits_per_dim(model, data, 750, None, CPU)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_gaussian_data_is_the_closed_form(variance, generator):
    schedule = schedule_of(60)
    parts = measured_bound(schedule, variance, generator)["bits_per_dim_parts"]
    prior, middle, decoder = (nats / math.log(2) for nats in gaussian_bound(schedule, S**2, variance))
    assert parts["prior"] == pytest.approx(prior, rel=0.05)
    assert parts["middle"] == pytest.approx(middle, rel=0.01)
    assert parts["decoder"] == pytest.approx(decoder + WIDTH, rel=0.01)


def test_bound_of_gaussian_data_tends_to_its_entropy(generator):
    """With the right variance the gap closes as 1 / T; with the fixed ones it does not, whatever T."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * S**2)

    def gap(variance, num_timesteps):
        return sum(gaussian_bound(schedule_of(num_timesteps), S**2, variance)) - entropy

    gaps = [gap("learned", n) for n in (100, 400, 1600)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0 and gaps[2] < 0.004
    assert gap("fixed_large", 1600) > 0.1 and gap("fixed_small", 1600) > 0.4
    report = measured_bound(schedule_of(100), "learned", generator)
    measured = (report["bits_per_dim"] - WIDTH) * math.log(2) - entropy
    assert measured == pytest.approx(gaps[0], abs=4 * report["bits_per_dim_stderr"])
