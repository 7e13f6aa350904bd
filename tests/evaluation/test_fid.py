"""FID and its relatives against closed forms; their plumbing with a randomly initialised Inception; neighbours."""

import dataclasses
import hashlib
import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import group
from helpers.pipeline import TINY, main
from torch_fidelity import feature_extractor_inceptionv3

from modeling.evaluation.fid import (
    URL_INCEPTION_V3,
    Unavailable,
    download,
    frechet_distance,
    kept_samples,
    load_inception,
    quality_metrics,
    reference_features,
)
from modeling.evaluation.nearest import nearest_images, panel
from modeling.inference.device import Compute
from modeling.reliability.errors import UserError
from modeling.stages import evaluate

CPU = torch.device("cpu")


def features(n, mean, variances, generator):
    """Features whose sample mean and sample covariance are exactly the given ones."""
    x = torch.randn(n, len(variances), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # white
    return x * torch.tensor(variances, dtype=torch.float64).sqrt() + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_closed_forms(generator):
    a = features(200, [0, 0, 0], [1, 2, 3], generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a + torch.tensor([1.0, -2.0, 0.5]), a) == pytest.approx(1 + 4 + 0.25)
    b = features(300, [1, 0, 0], [4, 2, 0.5], generator)
    expected = 1 + (1 - 2) ** 2 + 0 + (3**0.5 - 0.5**0.5) ** 2  # |d|^2 + sum (sigma_a - sigma_b)^2
    assert frechet_distance(a, b) == pytest.approx(expected)


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


def test_ten_thousand_samples_earn_the_plain_name(generator):
    pool = torch.randn(10_000, 2, generator=generator)
    assert {"fid", "kid", "inception_score", "precision", "recall"} <= set(quality_metrics(pool, pool, pool[:500]))


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
    inception = load_inception(weights[0], weights[1], CPU)
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pool, logits = inception.features([grey])
    assert pool.shape == (3, 2048) and logits.shape == (3, 1008)
    again, _ = inception.features([grey[:1].expand(1, 3, 8, 8), grey[1:]])
    torch.testing.assert_close(again, pool, rtol=1e-3, atol=1e-4)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_bad_inception_weights_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="SHA-256"):
        load_inception(weights[0], "6726825d", CPU)
    with pytest.raises(UserError, match="absent cannot be read"):
        load_inception(tmp_path / "absent", "6726825d", CPU)
    torch.save({"x": Malicious()}, tmp_path / "bad", pickle_module=pickle)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other")
    for name in ("bad", "other"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with pytest.raises(UserError, match="cannot be read"):
            load_inception(tmp_path / name, digest, CPU)
    assert not (tmp_path / "hacked").exists()


def test_no_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"could not be downloaded .* evaluation.inception_weights="):
        load_inception(None, "6726825d", CPU)


def test_kept_samples_are_drawn_once(tmp_path):
    drawn = []

    def draw(indices):
        drawn.append(indices)
        return torch.tensor(list(indices), dtype=torch.uint8).reshape(-1, 1, 1, 1)

    expected = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    assert torch.equal(torch.cat(list(kept_samples(tmp_path, 5, 2, draw))), expected)
    assert drawn == [range(0, 2), range(2, 4), range(4, 5)]
    (tmp_path / "0000002-0000004.npy").write_bytes(b"half")
    assert torch.equal(torch.cat(list(kept_samples(tmp_path, 5, 2, draw))), expected)
    assert drawn[3:] == [range(2, 4)]


def test_evaluate_measures_quality_and_says_how(weights, tmp_path):
    """Through the command line: measured with a local file, then without network, left out and said why."""
    weak = [
        "trainer.steps=1",
        "data.num_train=16",
        "evaluation.fid_samples=12",
        "evaluation.batch_size=5",
        f"out_dir={tmp_path}",
    ]
    local = [f"evaluation.inception_weights={weights[0]}", f"evaluation.inception_sha256={weights[1][:8]}"]
    state, quiet = tmp_path / "state", {"WANDB_MODE": "disabled"}
    done = main(state, tmp_path, *TINY, *weak, *local, **quiet)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "reports/evaluate.json").read_text())["evaluate"]["quality"]
    assert {"fid_12", "kid_12", "inception_score_12", "precision_12", "recall_12"} <= set(quality)
    assert quality["num_samples"] == 12 and quality["reference"] == "16 training images, not flipped"
    assert (quality["sampler"], quality["nfe"], quality["seed"]) == ("ddim", 3, 0)
    assert quality["inception_sha256"] == weights[1] and len(quality["weights_sha256"]) == 64
    again = main(state, tmp_path, *TINY, *weak, *local, "stage=evaluate", **quiet)
    assert again.returncode == 0 and "once" in done.stdout and "once" not in again.stdout  # the reference was kept
    assert json.loads((tmp_path / "reports/evaluate.json").read_text())["evaluate"]["quality"] == quality
    assert quality["device"] == "cpu" and quality["clip_denoised"] is True
    kept = [path.parent for path in state.glob("runs/*/samples-for-fid/*/0000000-*.npy")]
    assert len(kept) == 1  # of the same sampler, weights and code
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    without = main(state, tmp_path, *TINY, *weak, "stage=evaluate", **quiet, **offline)
    assert without.returncode == 0, without.stderr
    report = json.loads((tmp_path / "reports/evaluate.json").read_text())["evaluate"]
    assert "could not be downloaded" in report["quality"]["left_out"] and report["bits_per_dim"] > 0


@pytest.mark.parametrize("mirror", [False, True])
def test_nearest_images_is_an_exact_search(mirror, generator):
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8, generator=generator)
    queries = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=generator)
    queries[0], queries[1] = images[4321], images[77].flip(2)
    found = nearest_images(queries, images, 4, mirror)
    every = (images[None].float() - queries[:, None].float()).square().flatten(2).mean(2).sqrt()
    if mirror:
        every = torch.minimum(
            every, (images[None].flip(4).float() - queries[:, None].float()).square().flatten(2).mean(2).sqrt()
        )
    expected = every.topk(4, dim=1, largest=False)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.rms, expected.values)
    assert found.indices[0, 0] == 4321 and found.rms[0, 0] == 0
    assert (found.rms[1, 0] == 0) == mirror and (found.indices[1, 0] == 77 or not mirror)
    picture = panel(queries, found)
    assert picture.shape == (3 * 6 + 2, 5 * 6 + 2, 3)
    assert torch.equal(picture[2:6, 2:6], queries[0].permute(1, 2, 0))
    assert torch.equal(picture[8:12, 8:12], found.images[1, 0].permute(1, 2, 0))


def test_downloaded_weights_and_a_damaged_cache(weights, tmp_path, monkeypatch, generator, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    kept = tmp_path / "hub/checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    file, digest = weights
    kept.symlink_to(file)
    assert download("0" * 8) == kept
    inception = load_inception(file, digest, CPU)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    found = reference_features(inception, images, "data", tmp_path / "cache", 2)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    cached.write_bytes(b"half")
    assert torch.equal(reference_features(inception, images, "data", tmp_path / "cache", 2), found)
    assert "is damaged" in caplog.text


def test_kept_samples_are_of_the_code_that_draws_them(tmp_path, monkeypatch):
    """Another sampling code, sampler or schedule: another folder; what changes no sample: the same."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    folders = []

    class Enough(Exception):
        pass

    def kept(folder, *_):
        folders.append(folder)
        raise Enough

    monkeypatch.setattr(evaluate, "kept_samples", kept)

    def folder_of(code="x", num_timesteps=10, **sampler):
        monkeypatch.setattr(evaluate, "code_hash", lambda entry: code)
        meta = {"sha256": "a", "run": "r", "config": {"diffusion": {"num_timesteps": num_timesteps}}}
        chosen = dataclasses.replace(
            group("sampler", "ddim", steps=4, clip_denoised=True, num_samples=5, batch_size=5, seed=0), **sampler
        )
        config = SimpleNamespace(sampler=chosen, evaluation=SimpleNamespace(fid_samples=12, batch_size=5))
        model = SimpleNamespace(variance="fixed_large")
        with pytest.raises(Enough):
            evaluate._quality(None, config, model, meta, {}, None, Compute(CPU, bf16=False))
        return folders[-1]

    first = folder_of()
    assert folder_of() == folder_of(batch_size=2) == folder_of(num_samples=9) == first
    others = [
        folder_of(code="y"),
        folder_of(num_timesteps=20),
        folder_of(steps=5),
        folder_of(label="cat"),
        folder_of(seed=1),
    ]
    assert len({first, *others}) == 6
