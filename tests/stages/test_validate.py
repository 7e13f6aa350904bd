"""The first stage refuses what a later one would, and says when params.yaml is not what conf/ composes to."""

import numpy as np
import pytest
from helpers.configs import CONF, composed, load
from helpers.images import write_images
from helpers.pipeline import TINY
from omegaconf import OmegaConf

from modeling.data.prepared import write_prepared
from modeling.data.sources import SOURCES
from modeling.recipe import check_params
from modeling.reliability.errors import ConfigError, UserError
from modeling.settings.keys import affects
from modeling.stages import validate


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The repository's root and the working folder."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "model.weights=x": "model.weights=x: for stage=sample",
    "trainer.resume=absent": "trainer.resume=absent: there is no ",
    "data=folder data.path=absent": "data.path=absent: there is no ",
    "evaluation.fid_samples=10 evaluation.inception_weights=absent": "inception_weights=absent: there is no ",
    "diffusion=sigmoid diffusion.tau=0.001": "diffusion.schedule=sigmoid: betas must be",
    "model.attention_resolutions=[7]": "model.attention_resolutions=7: images of 8 pixels have the resolutions [8",
    "model.channel_mult=[1,1,1,1,1]": "images of 8 pixels must be divisible by 16",
    "sampler.label=circle": "sampler.label=circle: the model is not class-conditional",
    "model.class_conditional=true sampler.label=x": "sampler.label=x: allowed are circle,",
    "model.patch_size=2": "have the resolutions [4, 2, 1]; model.attention_resolutions=[4] fits 8 x 8",
    "model.patch_size=3": "must be divisible by 12, for 3 resolutions of patches of 3; data.image_size=24 resizes them",
    "data=folder data.path=photos": "model.attention_resolutions=[7] fits 28 x 28",
    "data=folder data.path=photos data.image_size=9": "data.image_size=8 resizes them",
    "data=folder data.path=photos data.image_size=8 model.class_conditional=true": "the data has no classes",
    "data=folder data.path=taken": "no images in taken: it must hold files that end in",
    "data=mnist data.image_size=28": "model.attention_resolutions=[7] fits 28 x 28",
    "data=cifar100 model.class_conditional=true sampler.label=x": "sampler.label=x: allowed are apple, aquarium_fish,",
    "data=cifar10 model.class_conditional=true sampler.label=x": "sampler.label=x: allowed are airplane,",
    "model.class_conditional=true sampler.guidance_scale=2": "with trainer.label_dropout=0 the model learns no",
    "out_dir=taken": "taken/reports cannot be written",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_a_later_stage_would_refuse(root, arguments):
    (root / "taken").mkdir()
    (root / "taken/reports").write_text("a file where a folder must be")
    write_images(root / "photos", (28, 28), (28, 28))
    config = load(*TINY, *arguments.split())
    with pytest.raises(UserError) as refused:
        validate.run(config, root / (config.out_dir or "out"))
    assert REFUSED[arguments] in str(refused.value)
    assert not list(root.rglob("validated"))


def test_unknown_modes_of_the_environment_are_refused(root, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "never")
    with pytest.raises(ConfigError, match="WANDB_MODE=never"):
        validate.run(load(*TINY), root)


def test_what_can_run_is_let_through(root):
    write_images(root / "x", (28, 28), (28, 28))
    validate.run(load(*TINY, "data=folder", "data.path=x", "model.attention_resolutions=[7]"), root)
    assert (root / "data/validated").read_text()


NOISE = {
    "diffusion=linear diffusion.num_timesteps=100": "alphas_cumprod ends at 0.36: x_T",
    "diffusion=linear_scaled diffusion.num_timesteps=100": "",
    "diffusion=linear diffusion.num_timesteps=440": "alphas_cumprod ends at 0.01",
    "diffusion=linear diffusion.num_timesteps=480": "",
    "diffusion=cosine": "",
}


@pytest.mark.parametrize("arguments", NOISE)
def test_a_schedule_that_does_not_reach_noise_is_named(root, arguments, caplog):
    validate.run(load(*TINY, *arguments.split()), root)
    assert NOISE[arguments] in caplog.text and caplog.text.count("diffusion=linear_scaled") == bool(NOISE[arguments])


def test_forms_are_those_of_the_sources(root, monkeypatch):
    config = load(*TINY)
    source = affects(config.data, "weights")
    (images, _), _, classes = SOURCES["shapes"](num_train=1, num_test=1, image_size=8, seed=0)
    assert validate.known_form(config) == ([3, *images.shape[1:3]], [*classes])
    # The prepared folder is asked first, if it is of these settings.
    split = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64)
    folder = validate.prepared_folder(config, config.data)
    write_prepared(folder, (split, split, ["a"]), source)
    assert validate.known_form(config) == ([1, 4, 4], ["a"])
    write_prepared(folder, (split, split, ["a"]), source | {"seed": 5})
    assert validate.known_form(config)[0] == [3, 8, 8]
    monkeypatch.delitem(validate.FORMS, "shapes")  # a source need not know its own
    assert validate.known_form(config) is None
    validate.run(config, root)


CHANGED = ("data", "model", "diffusion", "optimizer", "sampler")
CHOICES = [(group, path.stem) for group in CHANGED for path in sorted((CONF / group).glob("*.yaml"))]
GIVEN = {"folder": ["data.path=x"], "tabulated": ["diffusion.num_timesteps=3", "diffusion.betas=[0.05,0.1,0.2]"]}
GIVEN["tabulated"] += ["trainer.sample_steps=2", "sampler.steps=3"]


MISFITS = {
    "tiny": {"ddpm", "patches", "linear_scaled"},
    "cifar10_cpu": {"shapes_tiny"},
    "cifar10_gpu": {"shapes_tiny"},
    "paper": {"shapes_tiny"},
}


# Without those that are another one with other numbers.
RECIPES = [path.stem for path in sorted((CONF / "experiment").iterdir()) if "override /" in path.read_text()]


@pytest.mark.no_cover  # what it runs so often is measured elsewhere
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_combines_with_every_choice(root, recipe):
    """Or is refused for what was typed: a choice that needs a value, or a network that does not fit the images."""
    for name in "ab":
        write_images(root / "x" / name, (32, 32))
    refused = set()
    for group, choice in CHOICES:
        typed = [f"experiment={recipe}", f"{group}={choice}", "device=cpu"]
        if choice in GIVEN:
            with pytest.raises(ConfigError, match=rf"{group}\.(path|betas): must be given"):
                load(*typed)
        try:
            validate.run(load(*typed, *GIVEN.get(choice, [])), root)
        except ConfigError as error:
            sizes, steps = "model.attention_resolutions=", "diffusion.num_timesteps=20: must be at least 21"
            assert str(error).startswith((sizes, steps)) and ("fits 8 x 8" in str(error) or steps in str(error))
            refused.add(choice)
    assert refused == MISFITS.get(recipe, set())


def test_params_that_conf_does_not_compose_to(monkeypatch, caplog):
    def params(*typed):
        return OmegaConf.to_container(composed(*typed))

    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    for typed in (["experiment=demo", "sampler=dpm_solver"], ["model=small"]):
        check_params(params(*typed) | {"stage": "validate", "out_dir": "."})
    assert not caplog.text
    check_params(params("experiment=demo", "optimizer.lr=0.5"))
    assert "conf/ composes to: optimizer.lr=0.5 (conf/ has 0.008); dvc exp run composes it anew" in caplog.text
    changed = params("experiment=demo")
    del changed["optimizer"]["eps"]
    with pytest.raises(ConfigError, match=r"differ in the key optimizer.eps \(1 in all\): dvc exp run composes"):
        check_params(changed)
    with pytest.raises(ConfigError, match="differ in the key trainer"):
        check_params({key: value for key, value in params().items() if key != "trainer"})
    monkeypatch.setenv("DVC_EXP_NAME", "x")  # DVC has just composed it
    check_params(changed)
