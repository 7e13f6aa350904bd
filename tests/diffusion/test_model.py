"""The forward process, the prediction with its guidance, and the loss."""

import pytest
import torch
from helpers.closed_forms import optimal_model, output_for, squashed
from torch import nn

from modeling.diffusion.model import PREDICTION_TYPES, DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.diffusion.unet import UNet


def test_q_sample_moments(schedule, generator):
    """Mean sqrt(alphas_cumprod) x_0 and variance 1 - alphas_cumprod: exact, as a linear map of x_0 and noise."""
    model = optimal_model(schedule, lambda x, _: x)
    t = torch.arange(schedule.num_timesteps)
    x_0 = torch.randn(len(t), 1, 2, 2, generator=generator, dtype=torch.float64)
    alpha_bar = schedule.alphas_cumprod.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(model.q_sample(x_0, t, 0 * x_0), alpha_bar.sqrt() * x_0)
    torch.testing.assert_close(model.q_sample(0 * x_0, t, x_0).square(), (1 - alpha_bar) * x_0.square())


def test_q_posterior_uses_the_time_of_each_sample(schedule):
    model = optimal_model(schedule, lambda x, _: x)
    x_0, t = torch.ones(2, 1, 1, 1, dtype=torch.float64), torch.tensor([0, schedule.num_timesteps - 1])
    mean, variance = model.q_posterior(x_0, 3 * x_0, t)
    expected = schedule.posterior_mean_coef1[t] + 3 * schedule.posterior_mean_coef2[t]
    torch.testing.assert_close(mean.flatten(), expected)
    torch.testing.assert_close(variance.flatten(), schedule.posterior_variance[t])


def test_predict_inverts_q_sample(schedule, generator):
    """With the true noise, the predicted x_0 is the image; clipped, eps is the noise of the clipped image."""
    x_0 = torch.rand(schedule.num_timesteps, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    t = torch.arange(schedule.num_timesteps)
    model = DiffusionModel(lambda x_t, t: noise, schedule)
    x_t = model.q_sample(x_0, t, noise)
    prediction = model.predict(x_t, t, clip_denoised=False)
    torch.testing.assert_close(prediction.x_0, x_0, rtol=0, atol=1e-8)
    torch.testing.assert_close(prediction.eps, noise)
    for shift in (-5, 5):
        clipped = model.predict(x_t + shift, t)
        assert clipped.x_0.abs().max() == 1
        torch.testing.assert_close(model.q_sample(clipped.x_0, t, clipped.eps), x_t + shift)


def test_first_loss_is_the_mean_square_of_the_noise(generator):
    """A zero-initialised output predicts 0: the loss of every sample is exactly mean(noise^2)."""
    network = UNet(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    model = DiffusionModel(network, NoiseSchedule(linear_betas(10, 1e-4, 0.02)))
    noise = torch.randn(3, 3, 8, 8, generator=generator)
    loss = model(torch.zeros(3, 3, 8, 8), torch.tensor([0, 5, 9]), noise)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(1), rtol=0, atol=0)
    assert [*model.state_dict()] == [f"network.{name}" for name in network.state_dict()]  # no tables


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_types_say_the_same(schedule, generator, prediction_type):
    """For the same belief about x_0 every type gives the same x_0 and eps, and the same held-out loss."""
    model = optimal_model(schedule, squashed, prediction_type=prediction_type)
    reference = optimal_model(schedule, squashed)
    t = torch.arange(schedule.num_timesteps)
    x_0, noise = torch.randn(2, len(t), 1, 2, 2, generator=generator, dtype=torch.float64)
    for clip in (False, True):
        got, expected = (m.predict(x_0, t, clip) for m in (model, reference))
        torch.testing.assert_close(got.x_0, expected.x_0, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(got.eps, expected.eps, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.simple_loss(x_0, t, noise), reference.simple_loss(x_0, t, noise))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_losses_of_the_prediction_types_differ_by_powers_of_the_snr(schedule, generator, prediction_type):
    """|x_0 error|^2 = |eps error|^2 / SNR and |v error|^2 = |eps error|^2 (1 + 1 / SNR); min-SNR makes them one."""
    n, gamma = schedule.num_timesteps, 5.0
    x_0, noise = torch.randn(2, n, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.arange(n).flip(0)
    snr = schedule.snr[t]
    model = optimal_model(schedule, squashed, prediction_type=prediction_type)
    eps_loss = model.simple_loss(x_0, t, noise)
    factor = {"epsilon": torch.ones(n), "sample": 1 / snr, "v_prediction": 1 + 1 / snr}[prediction_type]
    torch.testing.assert_close(model(x_0, t, noise), eps_loss * factor, rtol=1e-6, atol=1e-10)
    weighted = DiffusionModel(model.network, schedule, prediction_type, min_snr_gamma=gamma)
    torch.testing.assert_close(weighted(x_0, t, noise), eps_loss * snr.clamp(max=gamma) / snr, rtol=1e-6, atol=1e-10)


def test_hybrid_loss_trains_the_variance_and_only_it(generator):
    """Its gradient with respect to the mean's channels is that of the simple loss; the rest is the bound's."""
    schedule = NoiseSchedule(linear_betas(20, 1e-3, 0.2))
    out = torch.randn(20, 2, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    x_0 = torch.randint(0, 256, (20, 1, 2, 2), generator=generator).double() / 127.5 - 1
    noise = torch.randn(20, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.arange(20).flip(0)
    learned = DiffusionModel(lambda x_t, t: out, schedule, variance="learned")
    loss = learned(x_0, t, noise)
    simple = (out[:, :1] - noise).square().flatten(1).mean(1)
    bound = learned.bound_term(x_0, t, noise, clip_denoised=False)
    torch.testing.assert_close(loss, simple + 0.001 * 20 * bound)
    (gradient,) = torch.autograd.grad(loss.sum(), out)
    (expected,) = torch.autograd.grad(simple.sum(), out)
    torch.testing.assert_close(gradient[:, :1], expected[:, :1])
    assert bool((gradient[:, 1:].abs().flatten(1).sum(1) > 0).all()) and bool(gradient.isfinite().all())


def test_the_bound_is_that_of_the_label_and_of_clipped_images(generator):
    schedule = NoiseSchedule(linear_betas(20, 1e-3, 0.2))

    def network(x, t, y):
        return x * (1 + y.reshape(-1, 1, 1, 1))

    network.num_classes = 2
    y, t = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 3, 11, 19])
    x_0 = torch.randint(0, 256, (4, 1, 2, 2), generator=generator).double() / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    told = DiffusionModel(lambda x, t: network(x, t, y), schedule)
    clipped, free = (told.bound_term(x_0, t, noise, clip_denoised=clip) for clip in (True, False))
    assert torch.equal(DiffusionModel(network, schedule).bound_term(x_0, t, noise, y=y), clipped)
    assert not torch.equal(clipped, free)


def test_the_variance_of_the_first_step_is_that_of_the_second():
    """Whose own would be 0; a single step has beta."""
    for betas, expected in (([0.1, 0.2], 0.2 * 0.1 / 0.28), ([0.1], 0.1)):
        schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
        model = DiffusionModel(nn.Identity(), schedule, variance="fixed_small")
        like = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        assert model.log_variance(torch.tensor([0]), like, 0.0).exp().item() == pytest.approx(expected)


@pytest.mark.parametrize("option", ["prediction_type", "variance"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} 'no' is none of"):
        DiffusionModel(nn.Identity(), NoiseSchedule(torch.tensor([0.1])), **{option: "no"})


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 3.0])
def test_guidance_extrapolates_the_prediction(prediction_type, scale, variance, generator):
    """x_0 moves on the line from the unconditional to the conditional prediction; eps is the noise that fits.

    It is clipped after that, since the line may lead out of [-1, 1], or back.
    """
    schedule, seen = NoiseSchedule(linear_betas(20, 1e-3, 0.2)), []

    def network(x, t, y):
        """Says that x_0 is the value of the class; without a label, 0."""
        seen.append(len(x))
        x_0 = torch.tensor([0.5, -0.1, 0.0], dtype=x.dtype)[y].reshape(-1, 1, 1, 1).expand_as(x)
        out = output_for(x_0, x, schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1), prediction_type)
        return torch.cat([out, y.reshape(-1, 1, 1, 1).expand_as(x) - 1.0], 1) if variance == "learned" else out

    network.num_classes = 2
    model = DiffusionModel(network, schedule, prediction_type, variance)
    y, t = torch.tensor([1, 0, 0]), torch.tensor([0, 7, 19])
    x = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    line = (scale * torch.tensor([-0.1, 0.5, 0.5], dtype=torch.float64)).reshape(3, 1, 1, 1).expand_as(x)
    for clip, expected in ((False, line), (True, line.clamp(-1, 1))):
        x_0, eps, fraction = model.predict(x, t, clip, y, scale)
        torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(model.q_sample(x_0, t, eps), x)
        assert variance != "learned" or torch.equal(fraction[:, 0, 0, 0], y / 2.0)  # of the conditional prediction
    assert seen == [3 if scale == 1 else 6] * 2


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("labels", [None, [1, 0, 0]])
def test_autoguidance_goes_away_from_the_guide(prediction_type, labels, generator):
    """x_0 moves on the line from the guide's to the network's, beside what classifier-free guidance adds.

    A learned variance is the network's own.
    """
    schedule, calls = NoiseSchedule(linear_betas(20, 1e-3, 0.2)), []

    def saying(*values):
        """A network that says that x_0 is the value of the class, the last one without a label."""

        def network(x, t, y=None):
            calls.append((values, len(x)))
            y = torch.full((len(x),), 2) if y is None else y
            x_0 = torch.tensor(values, dtype=x.dtype)[y].reshape(-1, 1, 1, 1).expand_as(x)
            out = output_for(x_0, x, schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1), prediction_type)
            return torch.cat([out, torch.full_like(x, values[2])], 1)

        network.num_classes = 2
        return network

    model = DiffusionModel(saying(0.3, -0.1, 0.2), schedule, prediction_type, "learned")
    model.guide = saying(0.2, 0.1, 0.05)
    y, t = labels and torch.tensor(labels), torch.tensor([0, 7, 19])
    x = torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    none, own, guides = 0.2, torch.tensor([-0.1, 0.3, 0.3]), torch.tensor([0.1, 0.2, 0.2])
    if labels is None:
        own, guides = torch.full((3,), 0.2), torch.full((3,), 0.05)
    for scale in (1.0,) if labels is None else (1.0, 2.0):
        for auto in (0.0, 1.0, 3.0):
            calls.clear()
            x_0, eps, fraction = model.predict(x, t, False, y, scale, auto)
            expected = own + (scale - 1) * (own - none) + (auto - 1) * (own - guides)
            torch.testing.assert_close(x_0, expected.double().reshape(3, 1, 1, 1).expand_as(x), rtol=0, atol=1e-6)
            torch.testing.assert_close(model.q_sample(x_0, t, eps), x)
            assert torch.equal(fraction, torch.full_like(x, 0.6))
            assert [count for _, count in calls] == [3 if scale == 1 else 6] + [3] * (auto != 1)
    x_0, eps, _ = model.predict(x, t, True, y, 1.0, 9.0)
    assert x_0.abs().max() <= 1
    torch.testing.assert_close(model.q_sample(x_0, t, eps), x)


def test_autoguidance_needs_a_guide():
    model = DiffusionModel(lambda x, t: x, NoiseSchedule(torch.tensor([0.1])))
    with pytest.raises(ValueError, match="the model has no guide"):
        model.predict(torch.zeros(1, 1, 2, 2), torch.tensor([0]), autoguidance_scale=2.0)
