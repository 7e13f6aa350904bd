"""The folder format of diffusers, out and in; what it cannot express, or we cannot read, is refused by name."""

import json
import os
import pickle

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from helpers.configs import group
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.build import build_model, build_schedule
from modeling.checkpoints.model_file import load_trained
from modeling.diffusion.schedule import SCHEDULES
from modeling.interop.diffusers import load_diffusers, save_diffusers
from modeling.reliability.errors import ConfigError, UserError
from modeling.settings.groups import GROUPS, DiffusionConfig, parse_group

SMALL = {"model_channels": 8, "channel_mult": [1, 2], "attention_resolutions": [8], "norm_groups": 4}
MODEL = group("model", "tiny", **SMALL)
LINEAR = group("diffusion", "linear", num_timesteps=10)
COSINE = group("diffusion", "cosine", num_timesteps=10, prediction_type="v_prediction", variance="learned")
OURS = {"prediction_type": "epsilon", "variance": "fixed_small", "min_snr_gamma": None}


def saved(folder, model=MODEL, diffusion=LINEAR):
    meta = {"config": {"model": vars(model), "diffusion": vars(diffusion)}, "image_shape": [3, 8, 8], "classes": []}
    built = build_model(model, diffusion, (3, 8, 8), 2, 0)
    save_diffusers(folder, built.network.state_dict(), built.schedule.betas, meta)
    return folder


@pytest.fixture
def schedules(monkeypatch):
    """Two more schedules: diffusers has another formula under the name of the first, and does not know the second."""
    for name in ("scaled_linear", "halves"):
        monkeypatch.setitem(SCHEDULES, name, lambda num_timesteps: torch.full((num_timesteps,), 0.5).double())
        monkeypatch.setitem(GROUPS["diffusion"].choices, name, DiffusionConfig)


@pytest.mark.parametrize(
    ("diffusion", "schedule"),
    [
        (LINEAR, "linear"),
        (COSINE, "cosine"),
        (group("diffusion", "sigmoid", num_timesteps=10), "tabulated"),
        (DiffusionConfig(schedule="scaled_linear", num_timesteps=10, **OURS), "tabulated"),
        (DiffusionConfig(schedule="halves", num_timesteps=10, **OURS), "tabulated"),
    ],
    ids=lambda value: getattr(value, "schedule", ""),
)
def test_round_trip(tmp_path, schedules, diffusion, schedule):
    """diffusers and we read the same betas, and we read the same weights."""
    tensors, meta = load_diffusers(saved(tmp_path, diffusion=diffusion))
    expected = build_model(MODEL, diffusion, (3, 8, 8), 0, 0)
    assert {f"network.{k}" for k in expected.network.state_dict()} == set(tensors)
    assert all(torch.equal(tensors[f"network.{k}"], v) for k, v in expected.network.state_dict().items())
    read = parse_group("diffusion", meta["config"]["diffusion"])
    assert read.schedule == schedule and torch.equal(build_schedule(read).betas, expected.schedule.betas)
    for key in ("num_timesteps", "prediction_type", "variance"):
        assert getattr(read, key) == getattr(diffusion, key)
    assert meta["config"]["model"] == vars(MODEL) | {"name": "diffusers"}
    theirs = DDPMScheduler.from_pretrained(tmp_path / "scheduler").betas
    torch.testing.assert_close(theirs.double(), expected.schedule.betas, rtol=1e-4, atol=1e-7)


EDITS = {
    "norm_eps": ("unet/config.json", 1e-5),
    "up_block_types": ("unet/config.json", ["UpBlock2D", "UpBlock2D"]),
    "attention_head_dim": ("unet/config.json", 4),
    "sample_size": ("unet/config.json", "x"),
    "rescale_betas_zero_snr": ("scheduler/scheduler_config.json", True),
    "thresholding": ("scheduler/scheduler_config.json", True),
    "beta_schedule": ("scheduler/scheduler_config.json", "scaled_linear"),
    "block_out_channels": ("unet/config.json", [8, 12]),
    "snr_shift_scale": ("scheduler/scheduler_config.json", 3.0),
    "resnet_time_scale_shift": ("unet/config.json", "spatial"),
    "attn_norm_num_groups": ("unet/config.json", 2),
    "resnet_skip": ("unet/config.json", True),
    "does not divide": ("unet/config.json", {"attention_head_dim": 3}),
    "clip_sample_range": ("scheduler/scheduler_config.json", 2),
    "variance_type": ("scheduler/scheduler_config.json", "learned"),
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", EDITS)
def test_what_cannot_be_read_is_named(tmp_path, key):
    name, value = EDITS[key]
    edit(saved(tmp_path) / name, **value if isinstance(value, dict) else {key: value})
    with pytest.raises(UserError, match="not of a UNet2DModel" if key == "sample_size" else key):
        load_diffusers(tmp_path)


def test_trained_betas_override_the_other_keys_and_must_fit(tmp_path):
    path = saved(tmp_path) / "scheduler/scheduler_config.json"
    edit(path, beta_schedule="scaled_linear", trained_betas=[0.1, 0.2])
    assert load_trained(tmp_path)[0].schedule.betas.tolist() == [0.1, 0.2]
    edit(path, trained_betas=[0.1, 2.0])
    with pytest.raises(UserError, match="betas"):
        load_trained(tmp_path)


def test_a_scheduler_that_does_not_clip_is_said(tmp_path, caplog):
    edit(saved(tmp_path) / "scheduler/scheduler_config.json", clip_sample=False)
    load_diffusers(tmp_path)
    assert "sampler.clip_denoised=false does the same" in caplog.text


def test_the_flat_layout_of_the_first_published_models_is_read(tmp_path):
    tensors, meta = load_diffusers(saved(tmp_path / "new"))
    for path in (tmp_path / "new").glob("*/*"):
        path.rename(tmp_path / path.name)
    flat, flat_meta = load_diffusers(tmp_path)
    assert flat_meta == meta and all(torch.equal(flat[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_conditional": True}, "class-conditional"),
        ({"num_heads": 2}, "2 heads"),
        ({"patch_size": 2, "attention_resolutions": [4]}, "model.patch_size=2: a network of diffusers sees single"),
        ({"channel_mult": [2, 2]}, r"model.channel_mult=\[2, 2\]: a network of diffusers has"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        saved(tmp_path, group("model", "tiny", **SMALL | changes))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_network_is_exported_so_that_diffusers_computes_the_same_or_is_refused(tmp_path_factory, data):
    folder, draw = tmp_path_factory.mktemp("drawn"), data.draw
    levels = draw(st.integers(1, 3))
    changes = {
        "model_channels": draw(st.sampled_from([4, 8])),
        "channel_mult": [draw(st.integers(1, 3)) for _ in range(levels)],
        "num_res_blocks": draw(st.integers(1, 2)),
        "attention_resolutions": [8 >> level for level in range(levels) if draw(st.booleans())],
        "num_heads": draw(st.sampled_from([1, 2, 4])),
        "norm_groups": draw(st.sampled_from([2, 4])),
        "scale_shift": draw(st.booleans()),
    }
    model = group("model", "tiny", **changes)
    try:
        saved(folder, model, LINEAR)
    except ConfigError as error:
        assert ("model.channel_mult" in str(error)) == (model.channel_mult[0] != 1)
        return
    ours, meta = load_trained(folder)
    assert meta["config"]["model"] == vars(model) | {"name": "diffusers"}
    with torch.no_grad():
        for parameter in ours.network.parameters():  # else the network's output is 0
            parameter.normal_(std=0.2)
        save_diffusers(folder, ours.network.state_dict(), ours.schedule.betas, meta)
        theirs = UNet2DModel.from_pretrained(folder / "unet").eval()
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
        torch.testing.assert_close(ours.network(x, t), theirs(x, t).sample, rtol=1e-3, atol=1e-3)


def test_heads_at_one_width_are_exported(tmp_path):
    """The middle, which always attends, and the only attended resolution have the same width."""
    heads = group("model", "tiny", **SMALL | {"num_heads": 2, "attention_resolutions": [4]})
    assert load_diffusers(saved(tmp_path, heads))[1]["config"]["model"]["num_heads"] == 2
    assert json.loads((tmp_path / "unet/config.json").read_text())["attention_head_dim"] == 8


def test_a_hostile_folder_is_refused(tmp_path):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'hacked'}",)

    for content in (None, "[]", "3", "{"):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_trained(tmp_path)
    weights = saved(tmp_path) / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        load_diffusers(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no diffusion_pytorch_model"):
        load_diffusers(tmp_path)
    binary = weights.with_suffix(".bin")
    torch.save({}, binary)
    assert load_diffusers(tmp_path)[0] == {}
    for content in (pickle.dumps(Run()), b"", b"no pickle"):
        binary.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_trained(tmp_path)
    torch.save({"x": Run()}, binary)
    with pytest.raises(UserError, match="is damaged"):
        load_trained(tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "name", ["modeling.checkpoints.model_file.build_model", "modeling.interop.diffusers.load_safetensors"]
)
def test_too_little_memory_is_not_taken_for_damage(tmp_path, monkeypatch, name):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("full")

    folder = saved(tmp_path)
    monkeypatch.setattr(name, full)
    with pytest.raises(torch.OutOfMemoryError):
        load_trained(folder)
