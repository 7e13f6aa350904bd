"""Classifier-free guidance, and drawing sets of samples."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import group
from helpers.training import CPU, SMALL
from torch import nn

from modeling.build import build_model
from modeling.diffusion.model import PREDICTION_TYPES, DiffusionModel
from modeling.diffusion.samplers import SAMPLERS
from modeling.diffusion.schedule import NoiseSchedule, linear_betas
from modeling.inference.images import sample_grid
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError
from modeling.stages.sample import check_sampler_of

MODEL = group("model", "tiny", **SMALL)
COSINE = group("diffusion", "cosine", num_timesteps=10)


class ClassMean(nn.Module):
    """Predicts x_0 = the value of the class, in each prediction type; without a label, 0."""

    def __init__(self, schedule, prediction_type, learned=False):
        super().__init__()
        self.schedule, self.kind, self.learned = schedule, prediction_type, learned
        self.num_classes = 2

    def forward(self, x, t, y):
        a = self.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x_0 = torch.tensor([0.2, -0.1, 0.0], dtype=x.dtype)[y].reshape(-1, 1, 1, 1).expand_as(x)
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        out = {"epsilon": eps, "sample": x_0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x_0}[self.kind]
        return torch.cat([out, y.reshape(-1, 1, 1, 1).expand_as(x) - 1.0], 1) if self.learned else out


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_the_prediction(prediction_type, scale, learned, generator):
    """x_0 moves on the line from the unconditional to the conditional prediction; eps is the noise that fits."""
    schedule = NoiseSchedule(linear_betas(20, 1e-3, 0.2))
    variance = "learned" if learned else "fixed_small"
    model = DiffusionModel(ClassMean(schedule, prediction_type, learned), schedule, prediction_type, variance)
    y, t = torch.tensor([1, 0, 0]), torch.tensor([0, 7, 19])
    x = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_0, eps, fraction = model.predict(x, t, False, y, scale)
    expected = (scale * torch.tensor([-0.1, 0.2, 0.2], dtype=torch.float64)).reshape(3, 1, 1, 1).expand_as(x)
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.q_sample(x_0, t, eps), x)
    assert not learned or torch.equal(fraction[:, 0, 0, 0], y / 2.0)  # of the conditional prediction


def network(conditional):
    model = build_model(dataclasses.replace(MODEL, class_conditional=conditional), COSINE, (8, 8, 3), 3, 0).eval()
    for parameter in model.parameters():  # so that the zero-initialised ends pass something on
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_a_sample_is_the_same_whatever_the_batch(name, scale):
    model = network(scale is not None)
    sampler = group("sampler", name, steps=4, num_samples=5, batch_size=5, guidance_scale=scale or 1.0)
    if name == "ddim":
        sampler.eta = 0.5
    one = draw_samples(model, sampler, range(5), (3, 8, 8), CPU)
    two = draw_samples(model, dataclasses.replace(sampler, batch_size=2), range(5), (3, 8, 8), CPU)
    last = draw_samples(model, sampler, [4], (3, 8, 8), CPU)
    assert one.dtype == torch.uint8 and (one.int() - two.int()).abs().max() <= 1
    assert (last[0].int() - one[4].int()).abs().max() <= 1


def test_samples_take_the_classes_in_turn_or_the_one_that_is_asked_for():
    model = network(True)
    sampler = group("sampler", "ddim", steps=4, eta=0.5, guidance_scale=3.0)
    mixed = draw_samples(model, sampler, range(5), (3, 8, 8), CPU)
    for label in range(3):
        same = draw_samples(model, sampler, range(5), (3, 8, 8), CPU, label)
        close = [(same[k].int() - mixed[k].int()).abs().max() <= 1 for k in range(5)]
        assert [bool(c) for c in close] == [k % 3 == label for k in range(5)]


def test_grid_has_a_row_for_each_class():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)
    grid = sample_grid(images, 3)
    assert grid.shape == (14, 10, 3) and [grid[2 + 4 * r, 2 + 4 * c, 0].item() for r in range(3) for c in range(2)] == [
        0, 3, 1, 4, 2, 5,
    ]  # fmt: skip
    assert sample_grid(images, 0).shape == (10, 14, 3)


def test_what_a_conditional_model_cannot_be_asked_for_is_refused():
    meta = {"image_shape": [8, 8, 3], "classes": ["a", "b"], "config": {"trainer": {"label_dropout": 0.0}}}
    model = network(True)
    for changes, line in (
        ({"guidance_scale": 2.0}, "sampler.guidance_scale=2.0: with trainer.label_dropout=0 the model"),
        ({"steps": 1001}, "sampler.steps=1001: the model has "),
        ({"label": "c"}, "sampler.label=c: allowed are a, b"),
    ):
        sampler = dataclasses.replace(
            group("sampler", "ddim", steps=2, clip_denoised=True, num_samples=2, batch_size=2, seed=0), **changes
        )
        with pytest.raises(ConfigError, match=line):
            check_sampler_of(SimpleNamespace(sampler=sampler), model, meta)
