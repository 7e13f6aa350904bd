"""The held-out loss: its closed form, its time steps, and that no batch size changes it."""

import pytest
import torch
from helpers.training import CPU

from modeling.data.prepared import LabelledImages
from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.inference.held_out import held_out_losses, held_out_timesteps


def test_held_out_loss_of_the_zero_network_is_the_power_of_the_noise():
    model = DiffusionModel(lambda x, t: torch.zeros_like(x), NoiseSchedule(linear_betas(100, 1e-4, 0.02)))
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    images = LabelledImages(images, torch.zeros(40, dtype=torch.int64))
    losses, t = held_out_losses(model, images, 40, CPU)
    assert losses.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(losses, held_out_losses(model, images, 7, CPU)[0])  # whatever the batch size
    assert torch.equal(t, held_out_timesteps(40, 100))


def test_held_out_timesteps_cover_the_range_evenly():
    t = held_out_timesteps(1000, 100)
    assert torch.equal(torch.bincount(t, minlength=100), torch.full((100,), 10))
    assert held_out_timesteps(1, 100).tolist() == [50] and held_out_timesteps(7, 1).tolist() == [0] * 7
