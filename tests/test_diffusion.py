"""The forward process, the prediction and the loss."""

import pytest
import torch
from conftest import optimal_model
from torch import nn

from modeling.diffusion import DiffusionModel
from modeling.schedule import NoiseSchedule, linear_betas
from modeling.unet import UNet


def test_q_sample_moments(schedule, generator):
    """Mean sqrt(alphas_cumprod) x_0 and variance 1 - alphas_cumprod: exact, as a linear map of x_0 and noise."""
    model = optimal_model(schedule, lambda x, _: x)
    x_0 = torch.randn(schedule.num_timesteps, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.arange(schedule.num_timesteps)
    shape = (-1, 1, 1, 1)
    mean = model.q_sample(x_0, t, torch.zeros_like(x_0))
    torch.testing.assert_close(mean, schedule.alphas_cumprod.sqrt().reshape(shape) * x_0)
    deviation = model.q_sample(torch.zeros_like(x_0), t, torch.ones_like(x_0))
    torch.testing.assert_close(deviation.square(), (1 - schedule.alphas_cumprod).reshape(shape).expand_as(x_0))


def test_q_sample_equals_the_chain_of_single_steps(schedule, generator):
    """The signal that survives the product of single steps, and its variance by recursion."""
    model = optimal_model(schedule, lambda x, _: x)
    x_0 = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    x = x_0
    for beta in schedule.betas:
        x = (1 - beta).sqrt() * x
    last = torch.tensor([schedule.num_timesteps - 1])
    torch.testing.assert_close(model.q_sample(x_0, last, torch.zeros_like(x_0)), x)


def test_q_posterior_uses_the_time_of_each_sample(schedule):
    model = optimal_model(schedule, lambda x, _: x)
    x_0, x_t = torch.ones(2, 1, 1, 1, dtype=torch.float64), 3 * torch.ones(2, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0, schedule.num_timesteps - 1])
    mean, variance = model.q_posterior(x_0, x_t, t)
    expected = schedule.posterior_mean_coef1[t] + 3 * schedule.posterior_mean_coef2[t]
    torch.testing.assert_close(mean.flatten(), expected)
    torch.testing.assert_close(variance.flatten(), schedule.posterior_variance[t])


def test_predict_inverts_q_sample(schedule, generator):
    """With the true noise, the predicted x_0 is the image; clipped, eps is the noise of the clipped image."""
    x_0 = torch.rand(schedule.num_timesteps, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    t = torch.arange(schedule.num_timesteps)

    class Constant(nn.Module):
        def forward(self, x_t, t):
            return noise

    model = DiffusionModel(Constant(), schedule)
    x_t = model.q_sample(x_0, t, noise)
    prediction = model.predict(x_t, t, clip_denoised=False)
    torch.testing.assert_close(prediction.x_0, x_0, rtol=0, atol=1e-8)
    torch.testing.assert_close(prediction.eps, noise)

    clipped = model.predict(x_t + 5, t, clip_denoised=True)
    assert clipped.x_0.abs().max() <= 1
    torch.testing.assert_close(model.q_sample(clipped.x_0, t, clipped.eps), x_t + 5)


def test_first_loss_is_the_mean_square_of_the_noise(generator):
    """A zero-initialised output predicts 0: the loss of every sample is exactly mean(noise^2)."""
    model = DiffusionModel(
        UNet(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,)),
        NoiseSchedule(linear_betas(10, 1e-4, 0.02)),
    )
    noise = torch.randn(3, 3, 8, 8, generator=generator)
    loss = model(torch.zeros(3, 3, 8, 8), torch.tensor([0, 5, 9]), noise)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(1), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["prediction_type", "variance"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} 'no' is none of"):
        DiffusionModel(nn.Identity(), NoiseSchedule(torch.tensor([0.1])), **{option: "no"})
