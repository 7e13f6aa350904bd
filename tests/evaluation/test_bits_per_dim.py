"""Bits/dim from a part of the time steps, and the held-out report."""

import math
import statistics
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


SPLITS = [(1, 5), (2, 1), (1000, 20), (1000, None), (50, 48), (50, 49), (50, 50), (100, 1)]


@pytest.mark.parametrize(("num_timesteps", "count"), SPLITS)
def test_strata_split_all_steps_but_the_first(num_timesteps, count):
    ranges = strata(num_timesteps, count)
    assert [t for first, end in ranges for t in range(first, end)] == list(range(1, num_timesteps))
    assert all(first < end for first, end in ranges) and (count is None or len(ranges) <= count)


def test_strata_grow_geometrically_but_none_is_empty():
    assert strata(8, 3) == [(1, 2), (2, 4), (4, 8)] and strata(1000, 20)[:3] == [(1, 2), (2, 3), (3, 4)]


def test_bits_per_dim_of_a_part_of_the_time_steps_agrees_with_all(images):
    whole = bits_per_dim(MODEL, images, 48, None, CPU)
    part = bits_per_dim(MODEL, images, 11, 12, CPU)
    spread = math.hypot(whole["bits_per_dim_stderr"], part["bits_per_dim_stderr"])
    assert abs(whole["bits_per_dim"] - part["bits_per_dim"]) < 4 * spread
    assert whole["bits_per_dim"] > 7.5  # uniform levels cost 8 bits
    assert sum(part["bits_per_dim_parts"].values()) == pytest.approx(part["bits_per_dim"])
    assert whole["bits_per_dim_timesteps"] == 60 and part["bits_per_dim_timesteps"] == 12


class Terms:
    """In place of a model: terms that are known for each image, label and time step; notes what it is asked for."""

    schedule, num_classes = SCHEDULE, 2

    def __init__(self):
        self.asked = []

    def bound_term(self, x_0, t, noise, y):
        self.asked.append((t, noise))
        return x_0.mean((1, 2, 3)) + 0.1 * t + 0.5 * y

    def simple_loss(self, x_0, t, noise, y):
        return t.float()


def test_bits_per_dim_and_its_standard_error_by_hand(images):
    """With every time step nothing is drawn but noise: the sum of the terms of each image."""
    labels = torch.arange(48) % 2
    model = Terms()
    report = bits_per_dim(model, LabelledImages(images.images, labels), 48, None, CPU)
    assert report["bits_per_dim_images"] == 48 and {noise.shape for _, noise in model.asked} == {(48, 1, 6, 6)}
    a = math.prod(1 - (1e-3 + (0.2 - 1e-3) * t / 59) for t in range(60))
    values = []
    for image, y in zip(images.images.double() / 127.5 - 1, labels.tolist(), strict=True):
        prior = 0.5 * (a * image.square().mean().item() - a - math.log(1 - a)) / math.log(2)
        values.append(prior + 60 * (image.mean().item() + 0.5 * y) + 0.1 * sum(range(60)))
    assert report["bits_per_dim"] == pytest.approx(statistics.mean(values), rel=1e-6)
    assert report["bits_per_dim_stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(48), rel=1e-6)


def test_each_image_draws_its_time_steps_from_all_strata():
    images = LabelledImages(torch.zeros(200, 1, 1, 1, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    model = Terms()
    report = bits_per_dim(model, images, 200, 12, CPU)
    (decoder, _), *middle = model.asked
    ranges = strata(60, 12)
    assert decoder.unique().tolist() == [0]
    assert [t.unique().tolist() for t, _ in middle] == [[*range(first, end)] for first, end in ranges]
    # Each stands for its stratum, and no two terms or images have the same noise.
    steps = sum((end - first) * t.double().mean().item() for (first, end), (t, _) in zip(ranges, middle, strict=True))
    assert report["bits_per_dim_parts"]["middle"] == pytest.approx(0.1 * steps - 59, rel=1e-5)
    assert len(torch.cat([noise for _, noise in model.asked]).unique()) == 13 * 200
    torch.manual_seed(1)  # changes nothing
    assert bits_per_dim(Terms(), images, 200, 12, CPU) == report


def test_the_held_out_loss_is_the_mean_of_its_quartiles(images):
    report = held_out_report(MODEL, images, 10, CPU)
    assert set(report["loss_by_t"]) == {"q1", "q2", "q3", "q4"} and report["loss_images"] == 48
    assert sum(report["loss_by_t"].values()) / 4 == pytest.approx(report["loss"], rel=1e-5)
    each_once = LabelledImages(torch.zeros(60, 1, 1, 1, dtype=torch.uint8), torch.zeros(60, dtype=torch.int64))
    assert held_out_report(Terms(), each_once, 10, CPU)["loss_by_t"] == {"q1": 7, "q2": 22, "q3": 37, "q4": 52}
    assert held_out_report(Terms(), each_once.first(1), 10, CPU)["loss_by_t"] == {"q3": 30}  # nothing of the others


def test_a_model_without_a_finite_loss_is_refused(images):
    model = optimal_model(SCHEDULE, lambda x_t, alpha_bar: x_t * math.nan)
    config = SimpleNamespace(evaluation=SimpleNamespace(batch_size=4))
    with pytest.raises(UserError, match="the held-out loss is nan: the model diverged"):
        _likelihood(config, model, images, CPU)
