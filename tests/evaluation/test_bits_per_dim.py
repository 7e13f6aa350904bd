"""Bits/dim from a part of the time steps, and the held-out report."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.closed_forms import optimal_model
from helpers.training import CPU

from modeling.data.prepared import LabelledImages
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.evaluation.bits_per_dim import bits_per_dim, held_out_report, strata
from modeling.reliability.errors import UserError
from modeling.stages.evaluate import _likelihood

SCHEDULE = NoiseSchedule(linear_betas(60, 1e-3, 0.2))
MODEL = optimal_model(SCHEDULE, lambda x_t, alpha_bar: x_t * alpha_bar.sqrt())


@pytest.fixture
def images(generator):
    images = torch.randint(0, 256, (48, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.zeros(48, dtype=torch.int64))


@pytest.mark.parametrize(("num_timesteps", "count"), [(1, 5), (2, 1), (1000, 20), (1000, None), (50, 49), (100, 1)])
def test_strata_split_all_steps_but_the_first(num_timesteps, count):
    ranges = strata(num_timesteps, count)
    assert [t for first, end in ranges for t in range(first, end)] == list(range(1, num_timesteps))
    assert count is None or len(ranges) <= count


def test_bits_per_dim_of_a_part_of_the_time_steps_agrees_with_all(images):
    whole = bits_per_dim(MODEL, images, 48, None, CPU)
    part = bits_per_dim(MODEL, images, 11, 12, CPU)
    spread = math.hypot(whole["bits_per_dim_stderr"], part["bits_per_dim_stderr"])
    assert abs(whole["bits_per_dim"] - part["bits_per_dim"]) < 4 * spread
    assert whole["bits_per_dim"] > 7.5  # uniform levels cost 8 bits
    assert sum(part["bits_per_dim_parts"].values()) == pytest.approx(part["bits_per_dim"])
    assert whole["bits_per_dim_timesteps"] == 60 and part["bits_per_dim_timesteps"] == 12


def test_the_held_out_loss_is_the_mean_of_its_quartiles(images):
    report = held_out_report(MODEL, images, 10, CPU)
    assert set(report["loss_by_t"]) == {"q1", "q2", "q3", "q4"} and report["loss_images"] == 48
    assert sum(report["loss_by_t"].values()) / 4 == pytest.approx(report["loss"], rel=1e-5)


def test_a_model_without_a_finite_loss_is_refused(images):
    model = optimal_model(SCHEDULE, lambda x_t, alpha_bar: x_t * math.nan)
    config = SimpleNamespace(evaluation=SimpleNamespace(batch_size=4))
    with pytest.raises(UserError, match="the held-out loss is nan: the model diverged"):
        _likelihood(config, model, images, CPU)
