"""The nearest training images of samples."""

import pytest
import torch

from modeling.evaluation import nearest
from modeling.evaluation.nearest import nearest_images


def test_the_order_of_near_distances_is_exact():
    """Squared distances of 1 to 40 between bright images of 32 x 32, which float32 would round away."""
    query = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    images = query.repeat(40, 1, 1, 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for k, squared in enumerate((order + 1).tolist()):
        images[k].view(-1)[:squared] += 1
    found = nearest_images(query, images, 40, False)
    assert torch.equal(found.indices[0], order.argsort())
    torch.testing.assert_close(found.rms[0], (torch.arange(1, 41) / 3072).sqrt())


def test_large_images_are_searched_a_few_at_a_time(monkeypatch, generator):
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8, generator=generator)
    whole, sizes = nearest_images(images[:2], images, 3, True), []

    def measured(flat, part):
        sizes.append(len(part))
        return squared(flat, part)

    squared = nearest._squared_distance
    monkeypatch.setattr(nearest, "_squared_distance", measured)
    for values, expected in ((4 * 48 + 47, [4, 4, 4, 4, 1, 1]), (1, [1] * 18)):
        sizes.clear()
        monkeypatch.setattr(nearest, "CHUNK", values)
        found = nearest_images(images[:2], images, 3, True)
        assert sizes == expected and torch.equal(found.indices, whole.indices) and torch.equal(found.rms, whole.rms)


@pytest.mark.parametrize("mirror", [False, True])
def test_nearest_images_is_an_exact_search(mirror, generator):
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8, generator=generator)
    queries = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=generator)
    queries[0], queries[1] = images[4321], images[77].flip(2)
    found = nearest_images(queries, images, 4, mirror)
    forms = [images, images.flip(3)] if mirror else [images]
    every = torch.stack(
        [(form.float() - queries[:, None].float()).square().flatten(2).mean(2).sqrt() for form in forms]
    )
    rms, form = every.min(0)
    expected = rms.topk(4, dim=1, largest=False)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.rms, expected.values)
    assert found.indices[0, 0] == 4321 and found.rms[0, 0] == 0
    assert (found.rms[1, 0] == 0) == mirror and (found.indices[1, 0] == 77 or not mirror)
    for n, k in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        index = found.indices[n, k]
        assert torch.equal(found.images[n, k], forms[form[n, index]][index])
