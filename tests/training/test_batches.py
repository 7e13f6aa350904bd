"""The order of the batches, their flips and their labels, as functions of (seed, step)."""

import torch

from modeling.data.prepared import LabelledImages
from modeling.inference.device import Compute
from modeling.inference.images import to_model
from modeling.seeds import step_seed
from modeling.training.batches import BatchSource


def source(n=10, batch_size=4, flip=False, seed=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return BatchSource(LabelledImages(images, torch.arange(n)), batch_size, seed, flip)


def test_every_epoch_is_a_permutation():
    s = source()
    stream = torch.cat([s.indices(step) for step in range(15)])  # 60 positions, 6 epochs
    epochs = stream.reshape(6, 10)
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 6


def test_batches_are_a_function_of_seed_and_step():
    assert torch.equal(source(flip=True).batch(7), source(flip=True).batch(7))
    assert not torch.equal(source(flip=True).batch(7), source(flip=True, seed=1).batch(7))


def test_labels_go_with_their_images():
    s = source()
    expected = to_model(s.images[s.labels(3)])  # the label of each image is its index
    assert torch.equal(s.batch(3), expected) and torch.equal(s.labels(3), s.indices(3))


def test_batch_larger_than_the_data_set():
    assert torch.bincount(source(n=3, batch_size=9).indices(0)).tolist() == [3, 3, 3]


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
    assert Compute(torch.device("cpu"), False).place(images) is images
