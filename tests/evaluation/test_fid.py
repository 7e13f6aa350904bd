"""FID and its relatives against closed forms, their caches, and the Inception network with random weights."""

import hashlib
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.training import CPU
from torch_fidelity import feature_extractor_inceptionv3

from modeling.evaluation import fid
from modeling.evaluation.fid import load_inception, quality_metrics, reference_features
from modeling.reliability.errors import UserError


def features(n, mean, variances, generator):
    """Features whose sample mean and sample covariance are exactly the given ones."""
    x = torch.randn(n, len(variances), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # white
    return x * torch.tensor(variances, dtype=torch.float64).sqrt() + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_closed_forms(generator):
    a = features(200, [0, 0, 0], [1, 2, 3], generator)
    assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert fid.frechet_distance(a + torch.tensor([1.0, -2.0, 0.5]), a) == pytest.approx(1 + 4 + 0.25)
    b = features(300, [1, 0, 0], [4, 2, 0.5], generator)
    expected = 1 + (1 - 2) ** 2 + 0 + (3**0.5 - 0.5**0.5) ** 2  # |d|^2 + sum (sigma_a - sigma_b)^2
    assert fid.frechet_distance(a, b) == pytest.approx(expected)
    assert math.isnan(fid.frechet_distance(a, b[:1]))  # no covariance


def test_metrics_of_known_sets(generator):
    reference = torch.randn(400, 8, generator=generator)
    logits = 100 * torch.eye(5).repeat(80, 1)
    same = quality_metrics(reference, logits, reference)
    assert same["fid_400"] == pytest.approx(0, abs=1e-5) and same["kid_400"] < 1e-3
    assert same["precision_400"] == same["recall_400"] == 1
    assert same["inception_score_400"] == pytest.approx(5, rel=0.05)  # five certain classes, evenly
    away = quality_metrics(reference + 100, logits, reference)
    assert away["precision_400"] == away["recall_400"] == 0 and away["fid_400"] == pytest.approx(8 * 100**2, rel=1e-3)
    narrow = quality_metrics(reference[:1].expand(400, 8) + 1e-3 * reference, logits, reference)
    assert narrow["precision_400"] > 0.9 and narrow["recall_400"] < 0.1


def test_precision_and_recall_need_more_images_than_neighbours(generator):
    pool = torch.randn(10, 2, generator=generator)
    named = {"precision_10", "recall_10"}
    assert named <= quality_metrics(pool, pool, pool[:4]).keys()
    assert not named & quality_metrics(pool, pool, pool[:3]).keys()


def test_kid_and_its_spread_over_the_subsets(monkeypatch):
    """Features of x^2 / 2 = 0 or 1 against 0: a subset of two has a KID of (1 + 1)^3 - 1 if both are 1, else of 0."""
    monkeypatch.setattr(fid, "KID_SUBSET", 2)
    pool = torch.zeros(12, 2)
    pool[:6, 0] = 2**0.5
    found = quality_metrics(pool, torch.eye(12), torch.zeros(12, 2))
    mean = found["kid_12"]
    assert mean == pytest.approx(7 * (6 * 5) / (12 * 11), abs=1)  # of 100 subsets that are drawn
    assert found["kid_std_12"] == pytest.approx((mean * (7 - mean)) ** 0.5)


def test_only_ten_thousand_samples_earn_the_plain_name(generator, monkeypatch):
    assert fid.MIN_SAMPLES == 10_000
    monkeypatch.setattr(fid, "MIN_SAMPLES", 40)
    pool = torch.randn(40, 2, generator=generator)
    names = {"fid", "kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall"}
    assert set(quality_metrics(pool, pool, pool)) == names
    assert set(quality_metrics(pool[:39], pool, pool)) == {f"{name}_39" for name in names}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of randomly initialised weights of torch-fidelity's Inception, and its SHA-256."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(network("random", ["2048"]).state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(weights, generator):
    inception = load_inception(*weights, CPU.device)
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pool, logits = inception.features([grey])
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008)
    again, _ = inception.features([grey[:1].expand(1, 3, 8, 8), grey[1:]])
    torch.testing.assert_close(again, pool, rtol=1e-3, atol=1e-4)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_bad_inception_weights_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        load_inception(weights[0], "6726825d", CPU.device)
    with pytest.raises(UserError, match="absent: there is no "):
        load_inception(tmp_path / "absent", "6726825d", CPU.device)
    torch.save({"x": Malicious()}, tmp_path / "bad", pickle_module=pickle)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("bad", "other"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with pytest.raises(UserError, match="cannot be read"):
            load_inception(tmp_path / name, digest, CPU.device)
    assert not (tmp_path / "hacked").exists()


def test_weights_are_downloaded_once(no_network, tmp_path, monkeypatch):
    with pytest.raises(fid.Unavailable, match=r"could not be downloaded .* evaluation.inception_weights="):
        load_inception(None, "6726825d", CPU.device)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: Path(path).touch(exist_ok=False))
    path = tmp_path / "hub/checkpoints" / Path(feature_extractor_inceptionv3.URL_INCEPTION_V3).name
    assert fid.download("0" * 8) == path == fid.download("0" * 8) and path.exists()


def test_features_of_the_reference_are_computed_once(pixels, tmp_path, generator, caplog):
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    caplog.set_level("INFO")

    def found(computed, data="data"):
        caplog.clear()
        pool = reference_features(pixels, images, data, tmp_path, 2)
        assert torch.equal(pool, images.flatten(1)[:, :2].float())
        assert ("features of 3 training images, once" in caplog.text) == computed

    found(True)
    found(False)
    (kept,) = tmp_path.glob("*.npy")
    kept.write_bytes(b"half")
    found(True)
    assert "is damaged" in caplog.text
    found(True, "other data")
