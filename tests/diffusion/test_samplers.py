"""The samplers of the registry against closed forms, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.closed_forms import optimal_model, sample, squashed
from helpers.configs import group
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mixture import Mixture
from modeling.diffusion.model import PREDICTION_TYPES, VARIANCES, Prediction
from modeling.diffusion.samplers import SAMPLERS, SPACINGS, timestep_subsequence
from modeling.diffusion.schedule import NoiseSchedule, cosine_betas, linear_betas, sigmoid_betas
from modeling.settings.keys import own_keys

# With the options of the shipped conf/, and what else can be chosen.
CHOICES = [(name, own_keys(group("sampler", name))) for name in SAMPLERS] + [("ddim", {"eta": e}) for e in (0.5, 1.0)]


@pytest.fixture
def x_T(generator):
    return torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)


MEASURES = {
    "uniform": lambda t, sigma: t,
    "quadratic": lambda t, sigma: math.sqrt(t),
    "log_snr": lambda t, sigma: math.log(sigma),
    "karras": lambda t, sigma: sigma ** (1 / 7),
}
"""What is even in each spacing, from t and sigma / alpha."""


BETAS = {
    "linear": lambda num_timesteps, draws: linear_betas(num_timesteps, 1e-4, 0.02),
    "cosine": lambda num_timesteps, draws: cosine_betas(num_timesteps),
    "sigmoid": lambda num_timesteps, draws: sigmoid_betas(num_timesteps, -3, 3, 1),
    "any": lambda num_timesteps, draws: 1e-8 + torch.rand(num_timesteps, generator=draws, dtype=torch.float64) * 0.9,
}


@settings(deadline=None)
@given(st.sampled_from([*SPACINGS]), st.sampled_from([*BETAS]), st.integers(1, 300), st.data())
def test_timestep_subsequence(spacing, schedule, num_timesteps, data):
    """Both ends, all different; each the nearest to its place of those that are free and leave room for the rest."""
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    alphas_cumprod = (1 - BETAS[schedule](num_timesteps, draws)).cumprod(0)
    alphas_cumprod = alphas_cumprod[alphas_cumprod > 1e-90]
    last = len(alphas_cumprod) - 1
    steps = data.draw(st.integers(1, last + 1))
    sequence = timestep_subsequence(alphas_cumprod, steps, spacing)
    assert len(sequence) == steps and sequence[0] == last and (steps == 1 or sequence[-1] == 0)
    assert all(a > b for a, b in itertools.pairwise(sequence))
    sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist()
    measure = [MEASURES[spacing](t, min(s, 80)) for t, s in enumerate(sigma)]
    if measure[-1] == measure[0]:
        return  # noise alone from the first step on
    values = np.linspace(measure[-1], measure[0], steps)
    for k, place in enumerate(np.interp(values[1:-1], measure, range(last + 1)), start=1):
        fewest, most = steps - 1 - k, sequence[k - 1] - 1
        assert abs(sequence[k] - min(max(place, fewest), most)) <= 0.5 + 1e-6


def test_steps_where_all_is_noise_alone_are_different():
    assert timestep_subsequence(torch.tensor([1e-5, 1e-6, 1e-7, 1e-8], dtype=torch.float64), 3, "log_snr") == [3, 1, 0]


def test_uniform_steps_are_those_of_ever():
    for last, gaps in itertools.product((0, 1, 5, 98, 999), (0, 1, 2, 4, 24, 98, 999)):
        if gaps <= last:
            expected = [last - round(k * last / max(gaps, 1)) for k in range(gaps + 1)]
            assert timestep_subsequence(torch.rand(last + 1), gaps + 1) == expected


@pytest.mark.parametrize("steps", [0, 11])
def test_timestep_subsequence_out_of_range(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps: allowed are 1 to 10"):
        timestep_subsequence(torch.linspace(0.9, 0.1, 10), steps)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_point_mass_is_returned_exactly(schedule, x_T, variance, prediction_type):
    """A value out of range is clipped at every step, the last too, if and only if that is asked for."""
    c = torch.tensor([0.3, -0.9, 1.7], dtype=torch.float64).reshape(3, 1, 1, 1).expand_as(x_T)
    model = optimal_model(schedule, lambda x, _: c, variance, prediction_type)
    for steps, (name, options) in itertools.product((1, 2, 5, 7), CHOICES):
        timesteps = timestep_subsequence(schedule.alphas_cumprod, steps)
        for clip, expected in ((True, c.clamp(max=1)), (False, c)):
            found = sample(name, model, x_T, timesteps, clip_denoised=clip, **options)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@given(st.integers(2, 300), st.data())
def test_point_mass_under_any_schedule_and_any_subsequence(num_timesteps, data):
    """Betas, time steps and the value are drawn; every sampler returns the value."""
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    schedule = NoiseSchedule(torch.rand(num_timesteps, generator=draws, dtype=torch.float64) * 0.5 + 1e-4)
    chosen = data.draw(st.sets(st.integers(0, num_timesteps - 1), min_size=1))
    c = torch.full((1, 1, 2, 2), data.draw(st.floats(-1, 1)), dtype=torch.float64)
    x = torch.randn(1, 1, 2, 2, generator=draws, dtype=torch.float64)
    model = optimal_model(schedule, lambda x, _: c)
    # Very noisy steps lose digits of c: alphas_cumprod down to 1e-90.
    timesteps = [t for t in sorted(chosen, reverse=True) if schedule.alphas_cumprod[t] > 1e-12] or [0]
    for name, options in CHOICES:
        torch.testing.assert_close(sample(name, model, x, timesteps, **options), c, rtol=0, atol=1e-6)


def test_the_solvers_of_the_ode_converge_to_its_solution(x_T):
    """On a mixture, whose ODE keeps quantiles. Order 1 for DDIM, 2 for 2M, 3 for UniPC, which corrects 2M."""
    schedule, mixture = NoiseSchedule(cosine_betas(4000)), Mixture()
    model = optimal_model(schedule, mixture.denoise)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    start, end = 3600, 400
    a, b = schedule.alphas_cumprod[[start, end]].reshape(2, 1, 1, 1, 1)
    exact = mixture.denoise(mixture.solution(x_T, a, b), b)

    def error(name, steps):
        # Evenly in log-SNR, which the order of the solver refers to.
        levels = torch.linspace(log_snr[start], log_snr[end], steps + 1, dtype=torch.float64)
        timesteps = [int((log_snr - level).abs().argmin()) for level in levels]
        return (sample(name, model, x_T, timesteps, clip_denoised=False) - exact).square().mean().sqrt().item()

    assert error("ddim", 40) < 0.55 * error("ddim", 20)
    assert error("dpm_solver", 40) < 0.28 * error("dpm_solver", 20)
    assert error("unipc", 40) < 0.2 * error("unipc", 20)
    assert error("dpm_solver", 20) < 0.2 * error("ddim", 20) and error("unipc", 20) < 0.2 * error("dpm_solver", 20)


@pytest.mark.parametrize("betas", [linear_betas(1000, 1e-4, 0.02), cosine_betas(1000)], ids=["linear", "cosine"])
def test_ten_steps_as_conf_has_them_are_nearer_than_25_of_ddim(betas, generator):
    schedule, mixture = NoiseSchedule(betas), Mixture()
    model = optimal_model(schedule, mixture.denoise)
    x_T = torch.randn(1, 1, 20, 20, generator=generator, dtype=torch.float64)
    exact = mixture.solution(x_T, schedule.alphas_cumprod[-1], torch.ones(()))

    def error(name, steps):
        timesteps = timestep_subsequence(schedule.alphas_cumprod, steps, group("sampler", name).spacing)
        return (sample(name, model, x_T, timesteps, clip_denoised=False) - exact).square().mean().sqrt().item()

    assert error("unipc", 10) < 0.75 * error("ddim", 25)


def test_a_step_without_one_before_it_is_of_first_order(schedule, x_T):
    """The first, and one more than twice as long in log-SNR as that before it."""
    model = optimal_model(schedule, squashed)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log().tolist()
    last = schedule.num_timesteps - 1
    for timesteps in ([last], [last, 0], [last, last - 1, 0]):
        assert len(timesteps) < 3 or log_snr[0] - log_snr[last - 1] > 2 * (log_snr[last - 1] - log_snr[last])
        torch.testing.assert_close(*(sample(name, model, x_T, timesteps) for name in ("dpm_solver", "ddim")))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_learned_variance_at_its_ends_is_the_fixed_ones(schedule, x_T, fraction):
    learned = optimal_model(schedule, squashed, "learned", fraction=fraction)
    fixed = optimal_model(schedule, squashed, "fixed_large" if fraction else "fixed_small")
    timesteps = timestep_subsequence(schedule.alphas_cumprod, 5)
    torch.testing.assert_close(*(sample("ddpm", model, x_T, timesteps) for model in (learned, fixed)))


def test_ddim_of_a_standard_normal_is_a_product_of_cosines(schedule, x_T):
    """eps* = sqrt(1 - alphas_cumprod) x_t, so each step multiplies by the cosine of the angle it turns."""
    model = optimal_model(schedule, lambda x, alpha_bar: alpha_bar.sqrt() * x)
    timesteps = timestep_subsequence(schedule.alphas_cumprod, 6)
    angles = [math.acos(math.sqrt(schedule.alphas_cumprod[t])) for t in timesteps] + [0.0]
    factor = math.prod(math.cos(a - b) for a, b in itertools.pairwise(angles))
    out = sample("ddim", model, x_T, timesteps, clip_denoised=False)
    torch.testing.assert_close(out, factor * x_T)


def test_ddpm_of_a_standard_normal(schedule, x_T):
    """The mean of a step is sqrt(alpha_t) x_t; with fixed_large, variance 1 is kept until the last, noiseless step."""
    model = optimal_model(schedule, lambda x, alpha_bar: alpha_bar.sqrt() * x)
    timesteps = list(range(schedule.num_timesteps))[::-1]
    out = sample("ddpm", model, x_T, timesteps, lambda: torch.zeros_like(x_T), clip_denoised=False)
    torch.testing.assert_close(out, schedule.alphas_cumprod[-1].sqrt() * x_T)
    draws = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out = sample("ddpm", model, draws, timesteps[:2] + timesteps[-1:], clip_denoised=False)
    assert out.var().item() == pytest.approx(schedule.alphas_cumprod[0].item(), rel=0.04)


def test_ddpm_is_ddim_with_eta_one(schedule, x_T):
    model = optimal_model(schedule, squashed, "fixed_small")
    for steps, clip in itertools.product((2, 5, 7), (True, False)):
        timesteps = timestep_subsequence(schedule.alphas_cumprod, steps)
        ddpm = sample("ddpm", model, x_T, timesteps, clip_denoised=clip)
        ddim = sample("ddim", model, x_T, timesteps, clip_denoised=clip, eta=1.0)
        torch.testing.assert_close(ddpm, ddim)


def test_gaussian_with_full_covariance(x_T):
    """Data N(0, S): DDIM's map is linear; with many steps its covariance tends to S."""
    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
    root = torch.tensor([[0.6, 0.0], [0.35, 0.3]], dtype=torch.float64)
    covariance = root @ root.T

    def denoise(x, alpha_bar):
        a = alpha_bar.flatten()[0]
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2, dtype=torch.float64))
        return (x.flatten(1) @ gain.T).reshape(x.shape)

    basis = torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 2)
    model = optimal_model(schedule, denoise)
    rows = sample("ddim", model, basis, list(range(1000))[::-1], clip_denoised=False).reshape(2, 2)
    torch.testing.assert_close(rows.T @ rows, covariance, rtol=0.02, atol=2e-3)


def test_ideal_denoiser_of_a_finite_data_set_returns_members(x_T):
    schedule = NoiseSchedule(linear_betas(1000, 1e-4, 0.02))
    data = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)

    def denoise(x, alpha_bar):
        distance = (x[:, None] - alpha_bar.sqrt()[:, None] * data[None]).square().sum((2, 3, 4))
        weights = torch.softmax(-distance / (2 * (1 - alpha_bar.reshape(-1, 1))), dim=1)
        return torch.einsum("nk,kchw->nchw", weights, data)

    model = optimal_model(schedule, denoise)
    timesteps = timestep_subsequence(schedule.alphas_cumprod, 100)
    for name in ("ddim", "ddpm"):
        nearest = (sample(name, model, x_T, timesteps)[:, None] - data[None]).abs().amax((2, 3, 4)).amin(1)
        assert nearest.max() < 1e-3


@pytest.mark.parametrize(("eta", "draws"), [(0.0, 0), (0.5, 1), (1.0, 1)])
def test_ddim_adds_noise_of_its_variance_but_not_to_the_image(x_T, eta, draws):
    """Equation 16 of Song et al. 2021, seen where a network finds neither an image nor noise."""
    alphas_cumprod, seen, drawn = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64), [], []

    def predict(x, t):
        seen.append(x)
        return Prediction(0 * x, 0 * x, 0.0)

    def noise():
        drawn.append(torch.ones_like(x_T))
        return drawn[-1]

    SAMPLERS["ddim"](predict, x_T, [2, 0], alphas_cumprod, noise, eta=eta)
    sigma = eta * math.sqrt((1 - 0.9) / (1 - 0.2)) * math.sqrt(1 - 0.2 / 0.9)
    torch.testing.assert_close(seen[1], torch.full_like(x_T, sigma))
    assert len(drawn) == draws
