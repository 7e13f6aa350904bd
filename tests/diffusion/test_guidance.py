"""Classifier-free guidance."""

import pytest
import torch
from helpers.closed_forms import output_for

from modeling.diffusion.model import PREDICTION_TYPES, DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, linear_betas


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_the_prediction(prediction_type, scale, variance, generator):
    """x_0 moves on the line from the unconditional to the conditional prediction; eps is the noise that fits."""
    schedule = NoiseSchedule(linear_betas(20, 1e-3, 0.2))

    def network(x, t, y):
        """Says that x_0 is the value of the class; without a label, 0."""
        x_0 = torch.tensor([0.2, -0.1, 0.0], dtype=x.dtype)[y].reshape(-1, 1, 1, 1).expand_as(x)
        out = output_for(x_0, x, schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1), prediction_type)
        return torch.cat([out, y.reshape(-1, 1, 1, 1).expand_as(x) - 1.0], 1) if variance == "learned" else out

    network.num_classes = 2
    model = DiffusionModel(network, schedule, prediction_type, variance)
    y, t = torch.tensor([1, 0, 0]), torch.tensor([0, 7, 19])
    x = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_0, eps, fraction = model.predict(x, t, False, y, scale)
    expected = (scale * torch.tensor([-0.1, 0.2, 0.2], dtype=torch.float64)).reshape(3, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.q_sample(x_0, t, eps), x)
    assert variance != "learned" or torch.equal(fraction[:, 0, 0, 0], y / 2.0)  # of the conditional prediction
