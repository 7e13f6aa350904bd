"""The Frechet wavelet distance: against definitions, against torch-fidelity, and that it sees what a person sees."""

import math

import pytest
import torch
import torchvision.transforms.functional as F

from modeling.data.sources import shapes
from modeling.evaluation import distance, fid
from modeling.evaluation.distance import frechet_distances, packet_sums, wavelet_distance, wavelet_packets


@pytest.fixture(scope="module")
def data():
    """Two halves of drawn images, uint8 [600, 3, 16, 16]."""
    (images, _), _, _ = shapes(num_train=1200, num_test=10, image_size=16, seed=0)
    return torch.from_numpy(images).permute(0, 3, 1, 2).split(600)


def test_packets_are_sums_of_squares_with_signs(generator):
    """At 16 x 16 pixels: two levels, each coefficient a signed sum of 4 x 4 pixels over 4, and nothing is lost."""
    x = torch.randint(256, (1, 2, 16, 16), generator=generator, dtype=torch.uint8)
    packets = wavelet_packets(x)
    assert packets.shape == (1, 16, 2 * 4 * 4)
    pixels = x[0].double() / 255
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    blocks = pixels.view(2, 4, 4, 4, 4).transpose(2, 3)  # [C, row, column, 4, 4]
    expected = torch.einsum("crsij,ai,bj->abcrs", blocks, signs, signs).reshape(16, 32) / 4
    torch.testing.assert_close(packets[0, 0], expected[0])
    near = torch.cdist(packets[0], expected) < 1e-9
    assert torch.equal(near.sum(0), torch.ones(16, dtype=torch.int64)) and torch.equal(near.sum(1), near.sum(0))


@pytest.mark.parametrize(
    ("size", "packets", "values"), [(4, 1, 48), (8, 4, 48), (28, 64, 48), (25, 64, 48), (32, 64, 48)]
)
def test_any_size(size, packets, values):
    """Packets of at most 4 x 4; an image that does not divide is filled up with its border."""
    x = torch.full((2, 3, size, size), 51, dtype=torch.uint8)
    found = wavelet_packets(x)
    assert found.shape == (2, packets, values) and not found[:, 1:].any()
    torch.testing.assert_close(found[:, 0], torch.full((2, values), 0.2 * math.sqrt(packets), dtype=torch.float64))


def test_sums_of_parts_that_fit_the_memory(data, monkeypatch):
    """So many values at a time: of larger images fewer, and one at least."""
    whole, sizes = packet_sums(data[0]), []

    def packets(images):
        sizes.append(len(images))
        return wavelet_packets(images)

    monkeypatch.setattr(distance, "wavelet_packets", packets)
    for values, most in ((70 * data[0][0].numel(), 70), (1, 1)):
        sizes.clear()
        monkeypatch.setattr(distance, "BATCH", values)
        found = packet_sums(data[0])
        assert max(sizes) == sizes[0] == most and sum(sizes) == found.images == whole.images
        torch.testing.assert_close(found.second, whole.second)
        torch.testing.assert_close(found.first, whole.first)
    sizes.clear()
    monkeypatch.setattr(distance, "BATCH", 2 * 3 * 16 * 16)
    packet_sums(torch.zeros(5, 3, 2, 16, dtype=torch.uint8))  # filled up to 4 x 16, counted as a square
    assert sizes == [2, 2, 1]


def test_the_distance_is_the_mean_of_torch_fidelitys(data):
    a, b = data
    reference = packet_sums(b).normal()
    packets = [torch.log(1 + wavelet_packets(half).abs()) for half in (a, b)]
    expected = [fid.frechet_distance(packets[0][:, p], packets[1][:, p]) for p in range(16)]
    found = frechet_distances(packet_sums(a).normal(), reference)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-4)
    distance, _ = wavelet_distance(a, reference)
    assert distance == pytest.approx(sum(expected) / 16, rel=1e-6)


def test_the_standard_error_is_the_spread_of_other_samples(data):
    """It is right at some distance, as samples are, and too large, not too small, where the distance is all chance."""
    everything = torch.cat(data)
    reference = packet_sums(F.gaussian_blur(everything, 5, 1.0)).normal()
    generator = torch.Generator().manual_seed(0)
    drawn = [
        wavelet_distance(everything[torch.randint(1200, (200,), generator=generator)], reference) for _ in range(40)
    ]
    distances, errors = torch.tensor(drawn, dtype=torch.float64).T
    assert 0.75 < errors.mean() / distances.std() < 1.35


def test_the_standard_error_is_the_jackknifes(data, monkeypatch):
    monkeypatch.setattr(distance, "GROUPS", 3)
    images, reference = data[0][:10], packet_sums(data[1]).normal()
    without = [
        wavelet_distance(torch.cat([images[:a], images[b:]]), reference)[0] for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    mean = sum(without) / 3
    expected = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in without))
    assert wavelet_distance(images, reference)[1] == pytest.approx(expected, rel=1e-6)


def test_too_few_images_have_no_distance(data):
    a, b = data
    assert all(map(math.isnan, wavelet_distance(a[:3], packet_sums(b).normal())))
    assert all(map(math.isnan, wavelet_distance(a, packet_sums(b[:1]).normal())))
    assert all(map(math.isfinite, wavelet_distance(a[:4], packet_sums(b[:2]).normal())))


def test_it_sees_what_a_person_sees(data):
    """Blur, noise, colour casts and copies are further from the data than other images of it, and more is further."""
    real, other = data
    reference = packet_sums(other).normal()
    generator = torch.Generator().manual_seed(0)

    def measured(images):
        return wavelet_distance(images.round().clamp(0, 255).to(torch.uint8), reference)

    floor, error = measured(real)
    cast = torch.randn(600, 3, 1, 1, generator=generator)
    noise = torch.randn(real.shape, generator=generator)
    worse = {
        "cast": [real + 10 * cast, real + 30 * cast],
        "noise": [real + 5 * noise, real + 15 * noise],
        "blur": [F.gaussian_blur(real, 5, 0.6), F.gaussian_blur(real, 5, 1.2)],
        "copies": [real[:20].repeat(30, 1, 1, 1), real[:1] + noise],
        "saturation": [F.adjust_saturation(real, 1.3).float(), F.adjust_saturation(real, 2.0).float()],
    }
    centred = real.flatten(1).double() - real.double().mean(0).flatten()
    drawn = torch.randn(600, 600, generator=generator, dtype=torch.float64) @ centred / math.sqrt(600)
    worse["texture"] = [(real.double().mean(0) + drawn.view(real.shape)), real + 60 * noise]  # of the same covariance
    for name, (some, more) in worse.items():
        assert floor + 3 * error < measured(some.float())[0] < measured(more.float())[0], name
