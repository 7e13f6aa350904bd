"""The interface for notebooks; that its images are those of the command line: tests/stages/test_pipeline.py."""

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.configs import group
from helpers.training import CPU, MODEL
from hydra import compose, initialize_config_dir
from hydra.version import VersionBase

import modeling
from modeling.api import TrainedModel
from modeling.build import build_model
from modeling.recipe import conf_dir
from modeling.reliability.errors import UserError

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def model():
    """Of random weights, with a recipe that samples by DDIM in four noisy steps, guided in both ways."""
    config = dataclasses.replace(MODEL, class_conditional=True)
    built = build_model(config, group("diffusion", "cosine", num_timesteps=20), (3, 8, 8), 3, 0, has_guide=True).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # its output is 0 at first, whatever the label
    sampler = group("sampler", "ddim", steps=4, eta=0.5, guidance_scale=2.0, autoguidance_scale=1.5)
    recipe = {"sampler": sampler.method()}
    recipe["trainer"] = {"label_dropout": 0.1}
    return TrainedModel(built, {"config": recipe, "image_shape": [3, 8, 8], "classes": CLASSES}, CPU)


def test_the_samplers_own_noise_gives_the_same_images(model):
    for options in ({}, {"label": "dog"}, {"sampler": "ddpm", "steps": 3, "guidance_scale": 1.5}, {"batch_size": 2}):
        images = model.sample(5, seed=3, **options)
        assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8 and images.float().std() > 1
        assert torch.equal(model.sample(noise=model.noise(5, seed=3), seed=3, **options), images)
    classes = model.sample(5, seed=3)
    assert torch.equal(model.sample(5, seed=3, label="dog")[[1, 4]], classes[[1, 4]])  # 4 is of class 4 modulo 3
    assert not torch.equal(model.sample(5, seed=3, label="dog")[0], classes[0])
    assert not torch.equal(model.sample(5, seed=3, guidance_scale=1), classes)
    assert not torch.equal(model.sample(5, seed=3, autoguidance_scale=1), classes)


def test_a_prediction_is_that_of_the_model(model):
    x_t, t = model.noise(2), torch.tensor([3, 19])
    labels = {"owl": torch.tensor([2, 2]), None: torch.tensor([3, 3])}
    for label, y in labels.items():
        with torch.no_grad():
            expected = model.diffusion.predict(x_t, t, y=y, guidance_scale=3.0, autoguidance_scale=2.0)
        found = model.predict(x_t, t, label, 3.0, 2.0)
        assert torch.equal(found.x_0, expected.x_0) and not found.x_0.requires_grad


REFUSED = {
    "sampler=x: allowed are ddpm, ddim, dpm_solver, unipc": {"sampler": "x"},
    "sampler.foo: no such key; allowed are ": {"foo": 1},
    "sampler.eta: a key of sampler=ddim only": {"eta": 1.0},  # as on the command line: name the sampler too
    "sampler.label=cow: allowed are cat, dog, owl": {"label": "cow"},
    "sampler.steps=21: the model has 20 time steps": {"steps": 21},
    "sampler.num_samples: not from Python": {"num_samples": 3},
    "noise=[3, 2]: [N, 3, 8, 8] is needed": {"noise": torch.zeros(3, 2)},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_asked_for_is_one_line(model, line):
    with pytest.raises(UserError) as refused:
        model.sample(2, **REFUSED[line])
    assert str(refused.value).startswith(line)


def test_labels_and_names_that_there_are_not(model):
    with pytest.raises(UserError, match="label=cow: allowed are cat, dog, owl"):
        model.predict(model.noise(1), torch.tensor([0]), "cow")
    unguided = TrainedModel(copy.deepcopy(model.diffusion), model.meta, CPU)
    unguided.diffusion.guide = None
    with pytest.raises(UserError, match="autoguidance_scale=2: the model has no guide"):
        unguided.predict(model.noise(1), torch.tensor([0]), autoguidance_scale=2)
    with pytest.raises(UserError, match="no model in nowhere"):
        modeling.load_model("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modeling.nothing


def test_a_project_with_hydra_of_its_own(model, tmp_path):
    """As in a notebook: the model is used there, and the project's own configuration afterwards."""
    (tmp_path / "mine.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), "their-job", version_base="1.2"):
        assert model.sample(1, sampler="ddim", steps=1).shape == (1, 3, 8, 8)
        with pytest.raises(KeyError), conf_dir():
            raise KeyError("within")
        assert compose("mine") == {"a": 1} and str(VersionBase.instance().getbase()) == "1.2"
        assert compose("mine", return_hydra_config=True).hydra.job.name == "their-job"


def test_threads_compose_one_after_another(model):
    """As those of a web page do: Hydra has one state for all of them."""
    composing = threading.Event()

    def sample():
        with conf_dir():
            composing.set()
        return model.sample(1, sampler="ddim", steps=1)

    with ThreadPoolExecutor(1) as pool:
        with conf_dir():
            other = pool.submit(sample)
            assert not composing.wait(0.3)
        assert torch.equal(other.result(), model.sample(1, sampler="ddim", steps=1))
