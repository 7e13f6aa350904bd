"""The samplers of the registry against closed forms, in float64."""

import itertools
import math

import pytest
import torch
from helpers.closed_forms import optimal_model, sample, squashed
from helpers.configs import group
from hypothesis import given
from hypothesis import strategies as st

from modeling.diffusion.model import PREDICTION_TYPES, VARIANCES
from modeling.diffusion.samplers import SAMPLERS, timestep_subsequence
from modeling.diffusion.schedule import NoiseSchedule, cosine_betas, linear_betas
from modeling.settings import own_keys

# With the options of the shipped conf/, and what else can be chosen.
CHOICES = [(name, own_keys(group("sampler", name))) for name in SAMPLERS] + [("ddim", {"eta": e}) for e in (0.5, 1.0)]


@pytest.fixture
def x_T(generator):
    return torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)


@given(st.integers(1, 2000), st.data())
def test_timestep_subsequence(num_timesteps, data):
    steps = data.draw(st.integers(1, num_timesteps))
    sequence = timestep_subsequence(num_timesteps, steps)
    assert len(sequence) == steps and sequence[0] == num_timesteps - 1
    assert all(a > b for a, b in itertools.pairwise(sequence))
    spacing = (num_timesteps - 1) / max(steps - 1, 1)
    assert all(abs(num_timesteps - 1 - k * spacing - t) <= 0.5 + 1e-9 for k, t in enumerate(sequence))  # the nearest


@pytest.mark.parametrize("steps", [0, 11])
def test_timestep_subsequence_out_of_range(steps):
    with pytest.raises(ValueError, match="allowed are 1 to 10"):
        timestep_subsequence(10, steps)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_point_mass_is_returned_exactly(schedule, x_T, variance, prediction_type):
    """A value out of range is clipped at every step, the last too, if and only if that is asked for."""
    c = torch.tensor([0.3, -0.9, 1.7], dtype=torch.float64).reshape(3, 1, 1, 1).expand_as(x_T)
    model = optimal_model(schedule, lambda x, _: c, variance, prediction_type)
    for steps, (name, options) in itertools.product((1, 2, 5, 7), CHOICES):
        timesteps = timestep_subsequence(schedule.num_timesteps, steps)
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
    """Data N(0, s^2): the ODE has the solution x_0 = s x_T / sqrt(a_T s^2 + 1 - a_T). Order 1 for DDIM, 2 for 2M."""
    schedule, s2 = NoiseSchedule(cosine_betas(4000)), 0.3
    model = optimal_model(schedule, lambda x, a: a.sqrt() * s2 / (a * s2 + 1 - a) * x)
    log_snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).log()
    start, end = 3600, 400
    a, b = schedule.alphas_cumprod[start], schedule.alphas_cumprod[end]
    exact = ((b * s2 + 1 - b) / (a * s2 + 1 - a)).sqrt()

    def error(name, steps):
        # Evenly in log-SNR, which the order of the solver refers to; the factor of the last step is divided out.
        levels = torch.linspace(log_snr[start], log_snr[end], steps + 1, dtype=torch.float64)
        timesteps = [int((log_snr - level).abs().argmin()) for level in levels]
        last = b.sqrt() * s2 / (b * s2 + 1 - b)
        clean = sample(name, model, x_T, timesteps, clip_denoised=False)
        return (clean / (last * x_T) - exact).abs().max().item()

    assert error("ddim", 40) < 0.65 * error("ddim", 20)
    assert error("dpm_solver", 40) < 0.4 * error("dpm_solver", 20)
    assert error("dpm_solver", 20) < 0.2 * error("ddim", 20)


def test_dpm_solver_with_one_and_two_steps_is_ddim(schedule, x_T):
    model = optimal_model(schedule, squashed)
    for steps in (1, 2):
        timesteps = timestep_subsequence(schedule.num_timesteps, steps)
        torch.testing.assert_close(*(sample(name, model, x_T, timesteps) for name in ("dpm_solver", "ddim")))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_learned_variance_at_its_ends_is_the_fixed_ones(schedule, x_T, fraction):
    learned = optimal_model(schedule, squashed, "learned", fraction=fraction)
    fixed = optimal_model(schedule, squashed, "fixed_large" if fraction else "fixed_small")
    timesteps = timestep_subsequence(schedule.num_timesteps, 5)
    torch.testing.assert_close(*(sample("ddpm", model, x_T, timesteps) for model in (learned, fixed)))


def test_ddim_of_a_standard_normal_is_a_product_of_cosines(schedule, x_T):
    """eps* = sqrt(1 - alphas_cumprod) x_t, so each step multiplies by the cosine of the angle it turns."""
    model = optimal_model(schedule, lambda x, alpha_bar: alpha_bar.sqrt() * x)
    timesteps = timestep_subsequence(schedule.num_timesteps, 6)
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
        timesteps = timestep_subsequence(schedule.num_timesteps, steps)
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
    timesteps = timestep_subsequence(1000, 100)
    for name in ("ddim", "ddpm"):
        nearest = (sample(name, model, x_T, timesteps)[:, None] - data[None]).abs().amax((2, 3, 4)).amin(1)
        assert nearest.max() < 1e-3
