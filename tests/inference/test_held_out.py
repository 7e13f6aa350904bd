"""The held-out loss: its closed form, its time steps, and that no batch size changes it."""

import pytest
import torch
from helpers.training import CPU

from modeling.data.prepared import LabelledImages
from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.inference.held_out import held_out_losses, held_out_timesteps


@pytest.mark.parametrize("num_classes", [0, 3])
def test_held_out_loss_is_the_definition(num_classes):
    """Of a network that sees x, t and, with classes, y; image k has the noise of seed k, whatever the batch size."""

    def network(x, t, y=0):
        return 0.5 * x + torch.as_tensor(0.01 * t + 0.3 * y).reshape(-1, 1, 1, 1)

    network.num_classes = num_classes
    model = DiffusionModel(network, NoiseSchedule(linear_betas(100, 1e-4, 0.02)))
    pixels = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    images = LabelledImages(pixels, torch.arange(40) % 3)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0).tolist()
    times, expected = held_out_timesteps(40, 100), []
    for k, t in enumerate(times.tolist()):
        noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(k))
        x_t = alphas_cumprod[t] ** 0.5 * (pixels[k] / 127.5 - 1) + (1 - alphas_cumprod[t]) ** 0.5 * noise
        predicted = 0.5 * x_t + 0.01 * t + (0.3 * (k % 3) if num_classes else 0)
        expected.append((predicted - noise).square().mean().item())
    for batch_size in (40, 7):
        losses, t = held_out_losses(model, images, batch_size, CPU)
        assert losses.tolist() == pytest.approx(expected, rel=1e-5) and torch.equal(t, times)


def test_held_out_timesteps_cover_the_range_evenly():
    t = held_out_timesteps(1000, 100)
    assert torch.equal(torch.bincount(t, minlength=100), torch.full((100,), 10))
    assert t[:500].double().mean().item() == pytest.approx(50, abs=5)  # shuffled
    assert held_out_timesteps(1, 100).tolist() == [50] and held_out_timesteps(7, 1).tolist() == [0] * 7
