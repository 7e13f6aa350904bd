"""Sets of samples: their noise and labels, whatever the batches; grids; what a model cannot be asked for."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import group
from helpers.training import CPU, SMALL

from modeling.build import build_model
from modeling.diffusion.samplers import SAMPLERS
from modeling.inference.images import sample_grid, to_uint8
from modeling.inference.samples import DenoisingStrip, SampleNoise, draw_samples
from modeling.reliability.errors import ConfigError
from modeling.stages.sample import check_sampling


def draw(model, indices, name="ddim", label=None, **changes):
    """int32 images, of which a last bit may differ with the batch size."""
    sampler = group("sampler", name, **{"steps": 4} | changes)
    images = draw_samples(model, sampler, indices, (3, 8, 8), CPU, label)
    assert images.dtype == torch.uint8
    return images.int()


def network(conditional):
    config = group("model", "tiny", **SMALL, class_conditional=conditional)
    model = build_model(config, group("diffusion", "cosine", num_timesteps=10), (3, 8, 8), 3, 0).eval()
    for parameter in model.parameters():  # so that the zero-initialised ends pass something on
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_a_sample_is_the_same_whatever_the_batch(name, scale):
    model = network(scale is not None)
    changes = {"guidance_scale": scale or 1.0} | ({"eta": 0.5} if name == "ddim" else {})
    one = draw(model, range(5), name, batch_size=5, **changes)
    assert (one - draw(model, range(5), name, batch_size=2, **changes)).abs().max() <= 1
    assert (one[4] - draw(model, [4], name, **changes)[0]).abs().max() <= 1


def test_samples_take_the_classes_in_turn_or_the_one_that_is_asked_for():
    model = network(True)
    mixed = draw(model, range(5), eta=0.5, guidance_scale=3.0)
    for label in range(3):
        same = draw(model, range(5), label=label, eta=0.5, guidance_scale=3.0)
        close = (same - mixed).abs().amax((1, 2, 3)) <= 1
        assert close.tolist() == [k % 3 == label for k in range(5)]


@pytest.mark.parametrize(
    ("steps", "spacing", "shown"),
    [(4, "uniform", [9, 3, 0]), (3, "quadratic", [9, 2, 0]), (2, "uniform", [9, 0]), (1, "uniform", [9])],
)
def test_the_denoising_strip_is_what_the_first_samples_come_from(steps, spacing, shown):
    model, sampler = network(False), group("sampler", "ddim", steps=steps, spacing=spacing, batch_size=3)
    strip = DenoisingStrip(model.schedule.alphas_cumprod, sampler, count=2, frames=3)
    draw_samples(model, sampler, range(1, 4), (3, 8, 8), CPU, watch=strip)  # without sample 0
    assert not strip.frames and not strip.complete and strip.rows() == 0
    images = draw_samples(model, sampler, range(7), (3, 8, 8), CPU, watch=strip)
    assert strip.complete and list(strip.frames) == shown
    x_T = SampleNoise(sampler.seed, range(2), (3, 8, 8), "cpu")()
    assert torch.equal(strip.frames[9], to_uint8(x_T))
    assert strip.rows() == 2
    kept = {t: frame.clone() for t, frame in strip.frames.items()}
    draw_samples(model, sampler, range(7, 9), (3, 8, 8), CPU, watch=strip)  # a later batch is not watched
    assert all(torch.equal(strip.frames[t], frame) for t, frame in kept.items())
    alone = DenoisingStrip(model.schedule.alphas_cumprod, sampler, count=1, frames=3)
    draw_samples(model, sampler, range(1), (3, 8, 8), CPU, watch=alone)
    few = DenoisingStrip(model.schedule.alphas_cumprod, sampler, count=2, frames=3)
    draw_samples(model, sampler, range(1), (3, 8, 8), CPU, watch=few)
    assert few.rows() == 1
    assert torch.equal(alone.frames[9], strip.frames[9][:1])
    # From the last x_t on, the sampler returns the prediction of x_0.
    if steps == 4:
        x = x_T
        for t, after in ((9, 6), (6, 3), (3, 0)):
            x_0, eps, _ = model.predict(x, torch.tensor([t, t]), True)
            a = model.schedule.alphas_cumprod[after]
            x = (a.sqrt() * x_0 + (1 - a).sqrt() * eps).float()
            assert after not in shown or (strip.frames[after].int() - to_uint8(x).int()).abs().max() <= 1
    assert len(images) == 7


def test_grid_has_a_row_for_each_class():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)
    grid = sample_grid(images, 3)
    assert grid.shape == (14, 10, 3) and grid[2::4, 2::4, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert sample_grid(images, 0).shape == (10, 14, 3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"guidance_scale": 2.0}, "sampler.guidance_scale=2.0: with trainer.label_dropout=0 the model"),
        (
            {"autoguidance_scale": 2.0},
            "sampler.autoguidance_scale=2.0: the model has no guide; 1 is none",
        ),
        ({"steps": 1001}, "sampler.steps=1001: the model has "),
        ({"label": "c"}, "sampler.label=c: allowed are a, b"),
    ],
)
def test_what_a_conditional_model_cannot_be_asked_for_is_refused(changes, line):
    meta = {"image_shape": [3, 8, 8], "classes": ["a", "b"], "config": {"trainer": {"label_dropout": 0.0}}}
    sampler = group("sampler", "ddim", **{"steps": 2} | changes)
    with pytest.raises(ConfigError, match=line):
        check_sampling(SimpleNamespace(sampler=sampler), network(True), meta)


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    def noise(seed, indices):
        return SampleNoise(seed, indices, (1, 4, 4), "cpu")

    whole, parts = noise(3, range(6)), [noise(3, range(2)), noise(3, range(2, 6))]
    draws = [whole() for _ in range(3)]
    assert all(torch.equal(each, torch.cat([part() for part in parts])) for each in draws)
    assert len({d.sum().item() for d in torch.cat(draws)}) == 18
    # Of no other seed either: not shifted by some samples.
    seeds = torch.cat([SampleNoise(seed, range(1500), (1, 1, 2), "cpu")() for seed in range(4)])
    assert len(seeds.flatten(1).unique(dim=0)) == 6000


def test_noise_is_normal():
    """Uniform noise would have variance 1/12 and no tails."""
    draws = SampleNoise(0, range(4), (3, 64, 64), "cpu")()
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.var().item() == pytest.approx(1, abs=0.03)
    assert (draws.abs() > 2).double().mean().item() == pytest.approx(math.erfc(math.sqrt(2)), abs=0.005)
