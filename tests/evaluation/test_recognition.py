"""The classifier that recognises samples."""

import pytest
import torch
from helpers.training import CPU

from modeling.data.prepared import LabelledImages
from modeling.data.shapes import draw_shapes
from modeling.evaluation import recognition
from modeling.evaluation.recognition import kept_classifier, recognised, trained_classifier


def drawn(split, count):
    images, labels = (torch.from_numpy(array) for array in draw_shapes(count, 16, 0, split=split))
    return LabelledImages(images.permute(0, 3, 1, 2), labels)


def test_it_knows_real_shapes_and_is_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recognition, "EPOCHS", (10, 10**9))
    train, test = drawn(0, 600), drawn(1, 200)
    state = torch.random.get_rng_state()
    network = kept_classifier(train, "sha", 10, False, CPU, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing else is drawn differently for it
    right = recognised(network, *test, CPU)
    assert right.shape == (200,) and right.mean() > 0.9
    wrong = recognised(network, test.images, (test.labels + 1) % 10, CPU)
    assert wrong.mean() < 0.05

    trained = []
    monkeypatch.setattr(recognition, "trained_classifier", lambda *a: trained.append(a) or network)
    assert torch.equal(recognised(kept_classifier(train, "sha", 10, False, CPU, tmp_path), *test, CPU), right)
    assert not trained
    kept_classifier(train, "other data", 10, False, CPU, tmp_path)
    kept_classifier(train, "sha", 10, True, CPU, tmp_path)
    assert len(trained) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    kept_classifier(train, "sha", 10, False, CPU, tmp_path)
    assert len(trained) == 3 and "training it again" in caplog.text


@pytest.mark.parametrize("mirror", [True, False])
def test_what_it_is_trained_on(mirror, monkeypatch):
    """Every image equally often, moved by up to two pixels, and mirrored only if that is the same class."""
    images = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 5:] = 255  # bright on the right
    data = LabelledImages(images, torch.arange(30) % 3)
    seen, build, rates = [], recognition.build_classifier, []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    class Watched(torch.nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            self.network = build(*arguments)

        def forward(self, x):
            seen.append(x)
            return self.network(x)

    monkeypatch.setattr(recognition, "build_classifier", Watched)
    monkeypatch.setattr(recognition, "EPOCHS", (100, 10**9))
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    trained_classifier(data, 3, mirror, CPU)
    assert [len(x) for x in seen] == 30 * [30] and all(x.shape[1:] == (1, 8, 8) for x in seen)
    assert rates == pytest.approx([recognition.RATE * (1 - k / 30) for k in range(30)])
    left = torch.cat([(x[:, 0, 4, 0] > 0).float() for x in seen])
    assert 0.4 < left.mean() < 0.6 if mirror else not left.any()
    edges = {int((x[k, 0, 4] > 0).sum()) for x in seen for k in range(30)}
    assert edges == {1, 2, 3, 4, 5}  # three columns are bright, and the border is reflected


@pytest.mark.parametrize(("side", "sizes"), [(32, [100, 30]), (64, [25] * 5 + [5]), (512, [1] * 130)])
def test_large_images_are_looked_at_a_few_at_a_time(side, sizes):
    seen = []

    def network(x):
        seen.append(len(x))
        return x.mean((2, 3))  # the brightest channel

    images = torch.zeros(130, 3, side, side, dtype=torch.uint8)
    labels = torch.arange(130) % 3
    images[torch.arange(130), labels] = 200
    right = recognised(network, images, labels, CPU)
    assert seen == sizes and right.tolist() == [1.0] * 130
