"""Published models: the file is the model, whatever is damaged or does not fit is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import group
from helpers.training import DIFFUSION, MODEL, make
from safetensors.torch import save_file

from modeling.build import build_model
from modeling.checkpoints.model_file import load_model, load_trained, requested_variance, save_model, with_guide
from modeling.reliability.errors import ConfigError, UserError
from modeling.training.state import CheckpointFolder

CONFIG = {"model": dataclasses.asdict(MODEL), "diffusion": dataclasses.asdict(DIFFUSION)}
ABOUT = {"config": CONFIG, "image_shape": [8, 8, 3], "classes": [], "steps": 2}


def test_round_trip(tmp_path):
    path, tensors = tmp_path / "models/m.safetensors", {"w": torch.arange(6.0).reshape(2, 3).T}
    save_model(path, tensors, {"a": 1})
    found, about = load_model(path)
    assert torch.equal(found["w"], tensors["w"]) and about["a"] == 1
    first = path.read_bytes()
    save_model(path, tensors, {"a": 1})
    assert path.read_bytes() == first


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match="no model in"):
        load_model(path)
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="is damaged"):
        load_model(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="carries no configuration"):
        load_model(path)
    save_model(path, {"w": torch.zeros(1)}, {})
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="is damaged: its weights are not those that were saved"):
        load_model(path)


@pytest.fixture(scope="module")
def model():
    return build_model(MODEL, DIFFUSION, (3, 8, 8), 0, 0)


def test_the_file_is_the_model(tmp_path, model):
    save_model(tmp_path / "m", model.state_dict(), ABOUT)
    loaded, meta = load_trained(tmp_path / "m")
    assert meta == ABOUT | {"sha256": meta["sha256"], "image_shape": [3, 8, 8]} and not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_checkpoint_is_the_model_that_its_training_would_publish(tmp_path):
    trainer = make(tmp_path, steps=9)  # with a checkpoint every 4
    trainer.folder = CheckpointFolder(tmp_path, ABOUT | {"wandb_id": "w"})
    trainer.run()
    loaded, meta = load_trained(tmp_path)  # the newest
    assert meta["steps"] == 9 and meta["config"] == CONFIG and not loaded.training
    average = trainer.ema.model.state_dict()
    save_model(tmp_path / "m", with_guide(average, trainer.state.guide), ABOUT)
    assert meta["sha256"] == load_trained(tmp_path / "m")[1]["sha256"]
    found = loaded.network.state_dict(prefix="network.")
    assert all(torch.equal(tensor, average[name]) for name, tensor in found.items())
    assert all(torch.equal(w, trainer.state.guide[name]) for name, w in loaded.guide.state_dict().items())
    before = tmp_path / "step-000000008.pt"
    loaded, meta = load_trained(before)
    assert meta["steps"] == 8 and not torch.equal(
        loaded.state_dict()["network.conv_in.weight"], average["network.conv_in.weight"]
    )
    before.write_bytes(before.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint .*8\.pt is damaged"):
        load_trained(before)
    with pytest.raises(UserError, match="no model in"):
        load_trained(tmp_path / "step-000000007.pt")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/run.json").touch()
    with pytest.raises(UserError, match=r"no checkpoint in .*fresh yet"):
        load_trained(tmp_path / "fresh")


def test_a_checkpoint_from_before_its_guide_is_sampled_without_one(tmp_path):
    trainer = make(tmp_path, steps=9, guide_at=0.95)
    about = ABOUT | {"config": CONFIG | {"sampler": {"autoguidance_scale": 2.5}}}
    trainer.folder = CheckpointFolder(tmp_path, about)
    trainer.run()
    for step, has_guide, scale in ((8, False, 1.0), (9, True, 2.5)):
        loaded, meta = load_trained(tmp_path / f"step-{step:09}.pt")
        assert (loaded.guide is not None) == has_guide and meta["config"]["sampler"] == {"autoguidance_scale": scale}


def test_tensors_that_are_no_guide_are_refused(tmp_path, model):
    guide = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    for wrong in ({"w": torch.zeros(1)}, dict([*guide.items()][1:]), guide | {"conv_in.weight": torch.zeros(1)}):
        save_model(tmp_path / "m", with_guide(model.state_dict(), wrong), ABOUT)
        with pytest.raises(UserError, match="is not what it says"):
            load_trained(tmp_path / "m")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "many"},
        *({"config": CONFIG | {"data": data}} for data in ({"name": "x"}, {"name": "shapes", "width": 3}, 3)),
        {"config": CONFIG | {"model": CONFIG["model"] | {"model_channels": 16}}},
        {"config": CONFIG | {"model": CONFIG["model"] | {"model_channels": 4 * 10**6}}},
        {"config": CONFIG | {"model": CONFIG["model"] | {"num_res_blocks": 10**12}}},
        {"config": CONFIG | {"diffusion": CONFIG["diffusion"] | {"num_timesteps": 10**12}}},
    ],
)
def test_metadata_that_lie_are_refused(tmp_path, model, wrong):
    save_model(tmp_path / "m", model.state_dict(), ABOUT | wrong)
    with pytest.raises(UserError, match="is not what it says"):
        load_trained(tmp_path / "m")


def variance_of(named, held=DIFFUSION, **groups):
    """requested_variance for a file with MODEL and `held`, and a configuration of other groups."""
    config = SimpleNamespace(**{"model": MODEL, "diffusion": DIFFUSION, "named": {*named}} | groups)
    return requested_variance(config, "m", {"config": CONFIG | {"diffusion": dataclasses.asdict(held)}})


COSINE = group("diffusion", "cosine", num_timesteps=20, variance="fixed_large")
SMALL = dataclasses.replace(DIFFUSION, variance="fixed_small")
LEARNED = dataclasses.replace(DIFFUSION, variance="learned")


@pytest.mark.parametrize(
    ("named", "groups", "variance"),
    [
        ([], {"diffusion": dataclasses.replace(SMALL, num_timesteps=7)}, DIFFUSION.variance),
        (["diffusion.variance"], {"diffusion": SMALL}, "fixed_small"),
        (["diffusion"], {"diffusion": SMALL}, "fixed_small"),
        (["experiment"], {"diffusion": SMALL}, "fixed_small"),
        (["sampler.steps", "model.weights"], {"diffusion": COSINE}, DIFFUSION.variance),
        # Keys that change no weights may differ.
        (["diffusion"], {"diffusion": dataclasses.replace(SMALL, min_snr_gamma=5.0)}, "fixed_small"),
        (["model"], {"model": dataclasses.replace(MODEL, name="x", dropout=0.5, weights="m")}, DIFFUSION.variance),
    ],
)
def test_the_variance_is_the_files_unless_another_is_requested(named, groups, variance):
    assert variance_of(named, **groups) == variance


@pytest.mark.parametrize(
    ("named", "groups", "message"),
    [
        (["diffusion.num_timesteps"], {"diffusion": dataclasses.replace(DIFFUSION, num_timesteps=30)},
         r"diffusion.num_timesteps=30: the model in m has 20; leave it out"),
        (["diffusion"], {"diffusion": COSINE}, "diffusion.schedule=cosine: the model in m has linear"),
        (["diffusion.beta_end"], {"held": COSINE}, "diffusion.beta_end: the model has another diffusion, without"),
        (["diffusion.variance"], {"diffusion": LEARNED}, "diffusion.variance=learned: the model in m has fixed_large"),
        (["diffusion.variance"], {"held": LEARNED}, "diffusion.variance=fixed_large: the model in m has learned"),
        (["model"], {"model": dataclasses.replace(MODEL, model_channels=16)}, "model.model_channels=16: .* has 8"),
    ],
)  # fmt: skip
def test_a_request_that_the_weights_do_not_fit_is_refused(named, groups, message):
    with pytest.raises(ConfigError, match=message):
        variance_of(named, **groups)
