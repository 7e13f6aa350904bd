"""What a step trains on, as a function of (seed, step): images, flips, labels, time steps and noise."""

import pytest
import torch
from helpers.configs import group
from helpers.training import CPU, SMALL, make
from torch.overrides import TorchFunctionMode

from modeling.data.prepared import LabelledImages
from modeling.inference.images import to_model
from modeling.seeds import step_seed
from modeling.training.batches import BatchSource, StepInputs, draw_timesteps


def source(n=10, batch_size=4, flip=False, seed=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return BatchSource(LabelledImages(images, torch.arange(n)), batch_size, seed, flip)


def test_every_epoch_is_a_permutation():
    stream = torch.cat([source(batch_size=3).indices(step) for step in range(20)])  # 60 positions
    epochs = [tuple(epoch) for epoch in stream.reshape(6, 10).tolist()]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({*epochs}) == 6


def test_batches_are_a_function_of_seed_and_step():
    assert torch.equal(source(flip=True).batch(7), source(flip=True).batch(7))
    assert not torch.equal(source(flip=True).batch(7), source(flip=True, seed=1).batch(7))


def test_labels_go_with_their_images():
    s = source()
    expected = to_model(s.images[s.labels(3)])  # the label of each image is its index
    assert torch.equal(s.batch(3), expected) and torch.equal(s.labels(3), s.indices(3))


def test_batch_larger_than_the_data_set():
    assert torch.bincount(source(n=3, batch_size=9).indices(0)).tolist() == [3, 3, 3]


def test_a_part_of_a_batch_without_labels_has_none():
    x_0, t = torch.rand(3, 1, 2, 2), torch.arange(3)
    part = StepInputs(x_0, t, -x_0, None).part(slice(1, 3))
    assert torch.equal(part.x_0, x_0[1:]) and part.t.tolist() == [1, 2]
    assert torch.equal(part.noise, -x_0[1:]) and part.y is None


def test_flips_mirror_left_to_right_half_of_the_time():
    flipped, plain = source(n=400, batch_size=400, flip=True), source(n=400, batch_size=400)
    a, b = flipped.batch(0), plain.batch(0)
    same = (a == b).flatten(1).all(1)
    mirrored = (a == b.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all()) and 160 < int(mirrored.sum()) < 240
    assert torch.equal(b, to_model(plain.images[plain.indices(0)]))


def test_step_seeds_do_not_collide():
    seeds = {step_seed(s, name, step) for s in range(3) for name in ("noise", "t") for step in range(500)}
    assert len(seeds) == 3000 and max(seeds) < 2**63


def test_a_large_data_set_on_a_cpu_stays_where_it_is(monkeypatch):
    monkeypatch.setattr("modeling.inference.device.PLACE_AT_MOST", 3)
    images = torch.zeros(1, 2, 2, 1, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert CPU.place(images) is images


def test_a_conditional_network_is_told_the_class_and_sometimes_not(tmp_path):
    conditional = group("model", "tiny", **SMALL, class_conditional=True)
    inputs = make(tmp_path, model=conditional, label_dropout=0.3).source
    given = torch.cat([inputs.labels(step) for step in range(500)])
    true = torch.cat([inputs.batches.labels(step) for step in range(500)])
    dropped = given == 2
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(given[~dropped], true[~dropped])


@pytest.mark.parametrize("stratified", [False, True])
def test_timesteps_are_uniform(stratified):
    draws = [draw_timesteps(32, 10, stratified, torch.Generator().manual_seed(s)) for s in range(500)]
    counts = torch.stack([torch.bincount(t, minlength=10) for t in draws]).double()
    assert counts.shape[1] == 10 and torch.allclose(counts.mean(0), torch.full((10,), 3.2).double(), atol=0.3)
    assert (counts.std(0).max() < 0.6) == stratified


def test_the_recipe_chooses_how_time_steps_are_drawn(tmp_path):
    for sampling, each_once in (("stratified", True), ("uniform", False)):
        source = make(tmp_path, batch_size=20, timestep_sampling=sampling).source
        inputs = source.inputs(0)
        assert (sorted(inputs.t.tolist()) == [*range(20)]) == each_once and inputs.y is None
        assert torch.equal(inputs.t, source.inputs(0).t)  # a function of (seed, step)


def test_training_noise_is_normal(tmp_path):
    inputs = make(tmp_path).source
    noise = torch.cat([inputs.inputs(step).noise.flatten() for step in range(50)]).double()
    n = len(noise)
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5


class Draws(TorchFunctionMode):
    """Notes the device that every draw of random numbers names."""

    def __init__(self):
        super().__init__()
        self.devices = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randint):
            self.devices[func.__name__] = kwargs.get("device")
        return func(*args, **kwargs)


def test_time_steps_and_noise_are_drawn_on_the_training_device(tmp_path):
    """Without a GPU the wrong device shows only in what the draw asks for: none would be the CPU."""
    with Draws() as draws:
        make(tmp_path).source.inputs(0)
    assert draws.devices == {"randn": CPU.device, "randint": CPU.device}
