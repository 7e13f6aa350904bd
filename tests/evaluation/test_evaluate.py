"""The stage evaluate: quality with the facts that make it comparable, and the samples that it keeps."""

import dataclasses
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.configs import group, load
from helpers.pipeline import TINY
from helpers.training import CPU

from modeling.build import build_model
from modeling.checkpoints.model_file import load_model
from modeling.evaluation import fid
from modeling.inference.device import Compute
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError, Stopped
from modeling.stages import evaluate, export, prepare, sample, train


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a stage of the tiny recipe."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "state"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    few = ["trainer.steps=1", "data.num_train=12", "evaluation.batch_size=5", "precision=fp32"]

    def run(module, *arguments):
        module.run(load(*TINY, *few, f"out_dir={tmp_path}", *arguments), tmp_path)

    return run


def test_quality_is_measured_and_says_how(stage, pixels, no_network, tmp_path, monkeypatch, caplog):
    """With a local file; again, from what was kept; and without a network, left out with the reason."""

    def report():
        return json.loads((tmp_path / "reports/evaluate-details.json").read_text())

    caplog.set_level("INFO")
    stage(prepare)
    stage(train)
    with monkeypatch.context() as patch:
        loaded = []
        patch.setattr(fid, "load_inception", lambda *arguments: loaded.append(arguments) or pixels)
        local = ["evaluation.fid_samples=10", "evaluation.inception_weights=w", "evaluation.inception_sha256=01234567"]
        stage(evaluate, *local)
        quality = report()["quality"]
        assert {"fid_10", "kid_10", "inception_score_10", "precision_10", "recall_10"} <= set(quality)
        assert quality["num_samples"] == 10 and quality["reference"] == "12 training images, not flipped"
        assert (quality["sampler"], quality["nfe"], quality["seed"], quality["eta"]) == ("ddim", 3, 0, 0)
        assert (quality["device"], quality["precision"], quality["clip_denoised"]) == ("cpu", "float32", True)
        assert quality["inception_sha256"] == pixels.sha256 and len(quality["weights_sha256"]) == 64
        assert quality["variance"] == "fixed_small" and quality["label"] is None and quality["compile"] is False
        stage(evaluate, *local)
    assert loaded == 2 * [("w", "01234567", CPU.device)]
    assert report()["quality"] == quality and caplog.text.count("once") == 1  # the reference was kept
    kept = [path.parent for path in (tmp_path / "state").glob("runs/samples/*/0000000-*.npy")]
    assert len({*kept}) == 1  # of the same sampler, weights and code
    stage(evaluate, "evaluation.fid_samples=10")
    assert "could not be downloaded" in report()["quality"]["left_out"] and report()["bits_per_dim"] > 0
    stage(evaluate)
    assert report()["quality"] == {"left_out": "evaluation.fid_samples=null"}
    _check_that_a_stopped_sampling_goes_on(stage, tmp_path, monkeypatch)
    _check_that_few_images_are_named(stage, pixels, tmp_path, monkeypatch, caplog)


def _check_that_few_images_are_named(stage, pixels, tmp_path, monkeypatch, caplog):
    """Three to train and one to test: no neighbours, and no standard error."""
    few = ["data.num_train=3", "data.num_test=1", "evaluation.fid_samples=10"]
    monkeypatch.setattr(fid, "load_inception", lambda *_: pixels)
    stage(prepare, *few)
    stage(evaluate, *few)
    text = (tmp_path / "reports/evaluate.json").read_text()
    assert "NaN" not in text and json.loads(text)["bits_per_dim_stderr"] is None and "fid_10" in text
    details = json.loads((tmp_path / "reports/evaluate-details.json").read_text())
    assert (
        details["null"]
        == "bits_per_dim_stderr, wavelet_distance_of_test_images: too few images, 3 to train and 1 to test"
    )
    assert details["null"] in caplog.text and "without precision and recall" in caplog.text
    assert details["quality"]["without"].startswith("precision and recall, which look for 3 neighbours")
    assert not {"precision_10", "recall_10"} & {*details["quality"]}


def test_samples_of_classes_are_recognised_or_not(stage, tmp_path, monkeypatch):
    """By a classifier to which everything is of class 3."""

    def always(images):
        return torch.eye(10)[3].expand(len(images), 10)

    asked = []
    monkeypatch.setattr(evaluate, "kept_classifier", lambda *arguments: asked.append(arguments) or always)
    classes = ["model.class_conditional=true", "trainer.label_dropout=0.5", "trainer.random_flip=false"]
    stage(prepare)
    stage(train, *classes)
    stage(evaluate, *classes, "evaluation.num_samples=20", "sampler.num_samples=2")
    report = json.loads((tmp_path / "reports/evaluate-details.json").read_text())
    names = ("circle", "square", "triangle", "ring")
    assert [report["recognised_by_class"][name] for name in names] == [0, 0, 0, 1]
    assert report["recognised"] == json.loads((tmp_path / "reports/evaluate.json").read_text())["recognised"] == 0.1
    assert report["recognised_stderr"] == pytest.approx((0.09 / 19) ** 0.5)
    assert (
        asked[0][2:4] == (10, False)
        and asked[0][1] == json.loads((tmp_path / "data/shapes/data.json").read_text())["sha256"]["train"]
    )
    test = torch.from_numpy(np.load(tmp_path / "data/shapes/test_labels.npy"))
    assert report["recognised_of_test_images"] == pytest.approx((test == 3).double().mean().item())
    stage(evaluate, *classes, "sampler.label=ring")
    report = json.loads((tmp_path / "reports/evaluate-details.json").read_text())
    assert report["recognised"] == 1 and report["recognised_by_class"] == {"ring": 1}


def _check_that_a_stopped_sampling_goes_on(stage, tmp_path, monkeypatch):
    """The batches that were finished are not drawn again, and the pictures are those of a run without a stop."""
    few, drawn = ["sampler.num_samples=5", "sampler.batch_size=2", "sampler.seed=7"], []

    def draw(model, sampler, indices, *more):
        drawn.append(indices)
        if len(drawn) == 2:
            raise Stopped("stopped")
        return draw_samples(model, sampler, indices, *more)

    def pictures():
        return {path.name: path.read_bytes() for path in tmp_path.rglob("samples/0*.png")}

    monkeypatch.setattr(sample, "draw_samples", draw)
    with pytest.raises(Stopped):
        stage(sample, *few)
    assert not pictures()
    stage(sample, *few)
    assert drawn == [range(0, 2), range(2, 4), range(2, 4), range(4, 5)]
    found = pictures()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))  # where nothing is kept
    stage(sample, *few)
    assert pictures() == found and len(found) == 5 and len(drawn) == 7


def details(tmp_path):
    return json.loads((tmp_path / "reports/evaluate-details.json").read_text())


def test_an_evaluation_says_what_it_is_of(stage, tmp_path, monkeypatch, caplog):
    """Of which weights, made how, on which images; and what is no evaluation of the model is refused or told."""
    stage(prepare)
    stage(train)
    stage(evaluate, "sampler.steps=2", "sampler.num_samples=3", "evaluation.num_samples=20")
    found, (_, meta) = details(tmp_path), load_model(tmp_path / "models/model.safetensors")
    assert found["weights_sha256"] == meta["sha256"] and found["made_with"]["sampler"]["steps"] == 2
    assert found["made_with"]["evaluation"]["num_samples"] == 20 and found["variance"] == "fixed_small"
    assert found["data_sha256"] == meta["data_sha256"]
    assert (found["wavelet_distance_samples"], found["wavelet_distance_test_images"]) == (20, 16)  # no more are there
    strip = (tmp_path / "reports/denoising.png").read_bytes()

    def share_of_the_first(config, model, meta, indices, *more):
        return drawn(config, model, meta, indices[: len(indices) // 9], *more)

    drawn = evaluate.draw_configured
    with monkeypatch.context() as nine:  # processes; and the samples are kept
        nine.setattr(evaluate, "world_size", lambda: 9)
        nine.setattr(evaluate, "draw_configured", share_of_the_first)
        stage(evaluate, "sampler.steps=2", "sampler.num_samples=3", "evaluation.num_samples=20")
    assert (tmp_path / "reports/denoising.png").read_bytes() == strip and "not the images" not in caplog.text
    stage(export, "diffusion.variance=fixed_large")
    scheduler = json.loads((tmp_path / "diffusers/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "fixed_large" and meta["config"]["diffusion"]["variance"] == "fixed_small"
    stage(prepare, "data.num_test=8")
    stage(evaluate, "data.num_test=8", "diffusion.variance=fixed_large")
    assert details(tmp_path)["variance"] == "fixed_large" and "not the images" not in caplog.text
    stage(prepare, "data.image_size=16")
    with pytest.raises(ConfigError, match=r"its images are \[3, 16, 16\], those of the model \[3, 8, 8\]"):
        stage(evaluate, "data.image_size=16")
    with pytest.raises(ConfigError, match="for stage=sample and stage=evaluate only"):
        stage(train, "model.weights=x")
    stage(prepare, "data.seed=5")
    stage(evaluate, "data.seed=5")
    assert "data=shapes: not the images that the model was trained on" in caplog.text


def test_a_training_that_cannot_begin_ends_its_run_of_wandb(stage, monkeypatch):
    """Else the next job of a sweep, in the same process, would go on with it."""
    wandb_run = Mock()
    monkeypatch.setattr(train, "start_training_run", lambda *_: wandb_run)
    monkeypatch.setattr(train, "Trainer", Mock(side_effect=MemoryError))
    stage(prepare)
    with pytest.raises(MemoryError):
        stage(train)
    wandb_run.finish.assert_called_once_with(1)


def test_a_model_of_classes_is_evaluated_on_these_alone(stage, tmp_path):
    classes = ["model.class_conditional=true", "trainer.label_dropout=0.5"]
    stage(prepare)
    stage(train, *classes)
    path = tmp_path / "data/shapes/data.json"
    meta = json.loads(path.read_text())
    for other, first in ((["ant", *meta["classes"][1:]], ": ant in place of circle"), (meta["classes"][:9], "$")):
        path.write_text(json.dumps(meta | {"classes": other}))
        message = f"its {len(other)} classes are not the 10 that the model has learned{first}"
        with pytest.raises(ConfigError, match=f"^data=shapes: {message}"):
            stage(evaluate, *classes)


def test_kept_samples_are_of_all_that_decides_them(tmp_path, monkeypatch):
    """Other code, precision, schedule or sampler: another folder; what changes no sample: the same folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    folders = []

    class Enough(Exception):
        pass

    def kept(folder, *_):
        folders.append(folder)
        raise Enough

    monkeypatch.setattr(sample, "kept_samples", kept)
    config = load(*TINY, "evaluation.fid_samples=12")

    def folder(code="x", bf16=False, sampler=config.sampler, diffusion=config.diffusion, **changes):
        monkeypatch.setattr(sample, "code_hash", lambda *entries: code)
        used = dataclasses.replace(config, sampler=dataclasses.replace(sampler, **changes))
        meta = {"sha256": "a", "image_shape": (3, 8, 8), "classes": ["cat"], "config": {"diffusion": vars(diffusion)}}
        model = build_model(config.model, diffusion, (3, 8, 8), 0, 0)
        with pytest.raises(Enough):
            sample.configured_samples(used, model, meta, 12, Compute(CPU.device, bf16))
        return folders[-1]

    first = folder()
    assert folder() == folder(batch_size=2) == folder(num_samples=9) == first
    changes = [{"steps": 2}, {"seed": 1}, {"eta": 0.5}, {"clip_denoised": False}, {"label": "cat"}, {"compile": True}]
    changes += [{"code": "y"}, {"bf16": True}, {"sampler": group("sampler", "ddpm", steps=3)}]
    for change in ({"num_timesteps": 9}, {"variance": "fixed_large"}):
        changes.append({"diffusion": dataclasses.replace(config.diffusion, **change)})
    assert len({first, *(folder(**change) for change in changes)}) == 1 + len(changes)
