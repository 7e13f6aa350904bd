"""The shipped configuration composes and is valid; whatever a user may get wrong is one line that names the key."""

import pytest
from helpers.configs import CONF, composed, group, load
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from modeling.build import check_image_size
from modeling.config import load_config
from modeling.reliability.errors import UserError
from modeling.settings.groups import AdamWConfig, DDIMConfig, SGDConfig, parse_group


@pytest.mark.parametrize("typed", ["model=small +x=1", "experiment=demo optimizer=sgd optimizer.lr=1", "~data", "a=b"])
def test_the_tests_compose_as_hydra_does(typed):
    def outcome(compose, *arguments):
        try:
            return compose(*arguments)
        except HydraException as error:
            return str(error)

    found = outcome(composed, *typed.split())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert found == outcome(compose, "config", typed.split())


def test_defaults_are_the_papers():
    c = load()
    assert (c.optimizer.lr, c.optimizer.warmup_steps, c.optimizer.grad_clip) == (2e-4, 5000, 1.0)
    assert (c.trainer.steps, c.trainer.batch_size, c.trainer.ema_decay, c.trainer.random_flip) == (
        800e3,
        128,
        0.9999,
        True,
    )
    assert (c.diffusion.num_timesteps, c.diffusion.beta_start, c.diffusion.beta_end) == (1000, 1e-4, 0.02)
    assert c.model.dropout == 0.1 and c.data.name == "cifar10"


def test_choices_get_their_own_keys():
    assert isinstance(load("optimizer=adamw").optimizer, AdamWConfig)
    c = load("optimizer=sgd", "optimizer.momentum=0.95", "sampler=ddim", "sampler.eta=0.5")
    assert isinstance(c.optimizer, SGDConfig) and c.optimizer.momentum == 0.95
    assert isinstance(c.sampler, DDIMConfig) and c.sampler.eta == 0.5


BAD = {
    "+optimizer.momentum=0.9": "optimizer.momentum: a key of optimizer=muon and optimizer=sgd only",
    "+sampler.eta=0.5": "sampler.eta: a key of sampler=ddim only",
    "+trainer.speed=9": "trainer.speed: no such key; allowed are steps, batch_size",
    "+optimizer.speed=9": "optimizer.speed: no such key; allowed are name, lr, warmup_steps",
    "+nonsense=1": "nonsense: no such key; allowed are data, deterministic, device",
    "stage=fly": "stage=fly: allowed are all, check, validate, watch, prepare, train, sample, evaluate, report, export",
    "seed=x": "seed: Value 'x' of type 'str' could not be converted to Integer",
    "seed=-1": "seed=-1: must be at least 0",
    "data=folder": "data.path: must be given",
    "data.name=imagenet": "data.name=imagenet: allowed are cifar10, cifar100, fashion_mnist, folder, mnist,",
    "data.name=shapes": "data.name=shapes: write data=shapes, which sets all keys",
    "model.name=small": "model.name=small: write model=small, which sets all keys",
    "model.channel_mult=[1,a]": "model.channel_mult[1]: Value 'a' of type 'str'",
    "~data": "data=None: a group of keys is expected",
    "trainer.batch_size=0": "trainer.batch_size=0: must be greater than 0",
    "trainer.batch_size=many": "trainer.batch_size: Value 'many' of type 'str' could not be converted to Integer",
    "trainer.steps=1.5": "trainer.steps: Value '1.5' of type 'float' could not be converted to Integer",
    "trainer.ema_decay=1": "trainer.ema_decay=1.0: must lie in [0, 1)",
    "deterministic=maybe": "deterministic: Value 'maybe' is not a valid bool",
    "trainer.compile=maybe": "trainer.compile: Value 'maybe' is not a valid bool",
    "precision=fp8": "precision=fp8: allowed are auto, bf16, fp32",
    "device=tpu": "device=tpu: allowed are auto, cpu, cuda",
    "trainer.timestep_sampling=x": "trainer.timestep_sampling=x: allowed are",
    "trainer.sample_steps=1001": "trainer.sample_steps=1001: allowed are 1 to 1000",
    "diffusion.num_timesteps=0": "diffusion.num_timesteps=0: allowed are 1 to 1000000",
    "diffusion.beta_start=0": "diffusion.beta_start=0.0: must lie in [1e-08, 1)",
    "diffusion.beta_end=1": "diffusion.beta_end=1.0: must lie in (0, 1)",
    "diffusion.beta_start=0.5": "diffusion.beta_start=0.5: must be below beta_end=0.02",
    "diffusion.prediction_type=x": "diffusion.prediction_type=x: allowed are epsilon, sample, v_prediction",
    "diffusion.variance=x": "diffusion.variance=x: allowed are",
    "diffusion.min_snr_gamma=0": "diffusion.min_snr_gamma=0.0: must be above 0, or null",
    "trainer.label_dropout=0.1": "trainer.label_dropout=0.1: needs model.class_conditional=true",
    "sampler.guidance_scale=-1": "sampler.guidance_scale=-1.0: must be at least 0",
    "optimizer.lr=-1": "optimizer.lr=-1.0: must be greater than 0",
    "optimizer.lr_decay=step": "optimizer.lr_decay=step: allowed are none, cosine, linear",
    "optimizer.warmup_steps=-1": "optimizer.warmup_steps=-1: must be at least 0",
    "optimizer.grad_clip=0": "optimizer.grad_clip=0.0: must be above 0, or null",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: must be two numbers",
    "optimizer.betas=[0.9,1.0]": "optimizer.betas=[0.9, 1.0]: must be two numbers",
    "sampler.steps=1001": "sampler.steps=1001: allowed are 1 to 1000",
    "sampler.spacing=even": "sampler.spacing=even: allowed are uniform, quadratic, log_snr, karras",
    "sampler.seed=-1": "sampler.seed=-1: must be at least 0",
    "sampler.num_samples=0": "sampler.num_samples=0: must be greater than 0",
    "evaluation.bpd_images=0": "evaluation.bpd_images=0: must be at least 2",
    "evaluation.fid_samples=9": "evaluation.fid_samples=9: must be at least 10",
    "evaluation.inception_sha256=xyz": "evaluation.inception_sha256=xyz: must be 8 to 64 hexadecimal digits",
    "wandb.mode=on": "wandb.mode=on: allowed are online, offline, disabled",
    "wandb.timeout=0": "wandb.timeout=0.0: must be greater than 0",
    "model.model_channels=100": "model.norm_groups=32: must divide model.model_channels=100",
    "model.channel_mult=[]": "model.channel_mult=[]: must be positive",
    "model.num_heads=3": "model.num_heads=3: must divide the channels",
    "model.dropout=1": "model.dropout=1.0: must lie in [0, 1)",
    "data=shapes data.image_size=4": "data.image_size=4: must be at least 8",
    "data=shapes data.num_test=0": "data.num_test=0: must be greater than 0",
    "data=shapes data.seed=-1": "data.seed=-1: must be at least 0",
    "data=folder data.path=": "data.path=: must be the folder of your images",
    "data=folder data.path=x data.test_fraction=1": "data.test_fraction=1.0: must lie in (0, 1)",
    "data=folder data.path=x data.channels=2": "data.channels=2: allowed are 1 and 3",
    "data=folder data.path=x data.image_size=4": "data.image_size=4: must be at least 8, or null for images of one",
    "data=folder data.path=x data.background=pink": "data.background=pink: allowed are white, grey, black, or [red,",
    "data=folder data.path=x data.background=[1,2,256]": "data.background=[1, 2, 256]: allowed are white, grey,",
    "data=folder data.path=x data.background=[1,2]": "data.background=[1, 2]: allowed are white, grey,",
    "data=mnist data.image_size=31": "data.image_size=31: must be even, and at least the 28 pixels",
    "data=fashion_mnist data.image_size=26": "data.image_size=26: must be even, and at least the 28 pixels",
    "optimizer=sgd optimizer.momentum=1": "optimizer.momentum=1.0: must lie in [0, 1)",
    "optimizer=adamw optimizer.weight_decay=-1": "optimizer.weight_decay=-1.0: must be at least 0",
    "model.class_conditional=true trainer.label_dropout=1": "trainer.label_dropout=1.0: must lie in [0, 1)",
    "diffusion=sigmoid diffusion.start=4": "diffusion.start=4.0: must be below end=3.0",
    "diffusion=sigmoid diffusion.tau=0": "diffusion.tau=0.0: must be greater than 0",
    "sampler=ddim sampler.eta=2": "sampler.eta=2.0: must lie in [0, 1]",
    "model.norm_groups=1 model.model_channels=7": "model.model_channels=7: must be even",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_value_is_one_line_that_names_the_key(overrides):
    with pytest.raises(UserError) as caught:
        load(*overrides.split())
    assert str(caught.value).startswith(BAD[overrides]) and "\n" not in str(caught.value)


def test_a_string_in_place_of_a_group_is_refused():
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.model = "large"
    with pytest.raises(UserError, match="model=large: a group of keys is expected"):
        load_config(cfg)


def test_a_colour_in_numbers():
    assert load("data=folder", "data.path=x", "data.background=[0,99,255]").data.background == [0, 99, 255]


def test_a_model_file_from_before_a_key_was_there():
    old = {"name": "folder", "path": "x", "test_fraction": 0.1}
    new = vars(parse_group("data", old)) | {"watch": ["files"], "after": "files"}
    assert new == vars(group("data", "folder", path="x"))


def test_the_network_must_fit_the_images():
    model = load().model
    for size in (32, 64):
        check_image_size(model, size, size)
    for size, message in (
        ((32, 16), "must be square"),
        ((36, 36), "divisible by 8"),
        ((24, 24), "have the resolutions"),
    ):
        with pytest.raises(UserError, match=message):
            check_image_size(model, *size)


ADVICE = {  # by the model and the images: what the message proposes
    ("ddpm", 28, 28): "model.channel_mult=[1,2,2] model.attention_resolutions=[14]",
    ("tiny", 28, 28): "model.attention_resolutions=[7]",
    ("ddpm", 24, 24): "model.attention_resolutions=[12]",
    ("tiny", 50, 50): "model.channel_mult=[1,2] model.attention_resolutions=[25]",
    ("ddpm", 35, 35): "data.image_size=32",
    ("ddpm", 100, 75): "data.image_size=64",
    ("tiny", 20, 9): "data.image_size=8",
}


@pytest.mark.parametrize("case", ADVICE, ids=str)
def test_a_refusal_names_a_setting_that_works(case):
    choice, height, width = case
    with pytest.raises(UserError) as refused:
        check_image_size(load(f"model={choice}").model, height, width)
    assert f"; {ADVICE[case]} " in str(refused.value)
    overrides = ADVICE[case].split()
    if overrides[0].startswith("data.image_size="):
        height = int(overrides.pop().partition("=")[2])
    check_image_size(load(f"model={choice}", *overrides).model, height, height)


def test_a_network_that_no_size_fits_is_refused_all_the_same():
    model = load("model=tiny", "model.attention_resolutions=[5,7]").model
    with pytest.raises(UserError, match=r"must be square; data\.image_size=4 cuts"):
        check_image_size(model, 8, 9)
