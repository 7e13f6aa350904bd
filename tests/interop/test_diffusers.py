"""What a diffusers folder cannot express, or we cannot read, is refused by name."""

import json
import os
import pickle

import pytest
import torch
from helpers.configs import group

from modeling.build import build_model
from modeling.checkpoints.model_file import load_trained
from modeling.interop.diffusers import load_diffusers, save_diffusers
from modeling.reliability.errors import UserError

MODEL = group(
    "model",
    "tiny",
    model_channels=8,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_resolutions=[8],
    num_heads=1,
    dropout=0.0,
    norm_groups=4,
)
LINEAR = group("diffusion", "linear", num_timesteps=10, prediction_type="epsilon", variance="fixed_small")


def saved(folder, model=MODEL, diffusion=LINEAR):
    meta = {"config": {"model": vars(model), "diffusion": vars(diffusion)}, "image_shape": [8, 8, 3], "classes": []}
    save_diffusers(folder, build_model(model, diffusion, (8, 8, 3), 2, 0).network.state_dict(), meta)
    return folder


def test_too_little_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    folder = saved(tmp_path)

    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("full")

    for name in ("modeling.checkpoints.model_file.build_model", "modeling.interop.diffusers.load_safetensors"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(torch.OutOfMemoryError):
                load_trained(folder)
    assert load_trained(folder)[1]["sha256"]


@pytest.mark.parametrize(
    "diffusion",
    [LINEAR, group("diffusion", "cosine", num_timesteps=10, prediction_type="v_prediction", variance="learned")],
)
def test_round_trip(tmp_path, diffusion):
    tensors, meta = load_diffusers(saved(tmp_path, diffusion=diffusion))
    expected = build_model(MODEL, diffusion, (8, 8, 3), 0, 0).network.state_dict()
    assert {f"network.{k}" for k in expected} == set(tensors)
    assert all(torch.equal(tensors[f"network.{k}"], v) for k, v in expected.items())
    assert meta["config"]["diffusion"]["schedule"] == diffusion.schedule


EDITS = {
    "norm_eps": ("unet/config.json", 1e-5),
    "up_block_types": ("unet/config.json", ["UpBlock2D", "UpBlock2D"]),
    "attention_head_dim": ("unet/config.json", 4),
    "sample_size": ("unet/config.json", "x"),
    "trained_betas": ("scheduler/scheduler_config.json", [0.1]),
    "rescale_betas_zero_snr": ("scheduler/scheduler_config.json", True),
    "thresholding": ("scheduler/scheduler_config.json", True),
    "beta_schedule": ("scheduler/scheduler_config.json", "scaled_linear"),
}


@pytest.mark.parametrize("key", EDITS)
def test_what_cannot_be_read_is_named(tmp_path, key):
    name, value = EDITS[key]
    path = saved(tmp_path) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="not of a UNet2DModel" if key == "sample_size" else key):
        load_diffusers(tmp_path)


def test_a_scheduler_that_does_not_clip_is_said(tmp_path, caplog):
    path = saved(tmp_path) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    load_diffusers(tmp_path)
    assert "sampler.clip_denoised=false does the same" in caplog.text


def test_weights_missing_damaged_or_pickled(tmp_path):
    path = saved(tmp_path) / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        load_diffusers(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="no diffusion_pytorch_model"):
        load_diffusers(tmp_path)
    torch.save({}, path.with_suffix(".bin"))
    assert load_diffusers(tmp_path)[0] == {}


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(UserError, match="class-conditional"):
        saved(
            tmp_path,
            group(
                "model",
                "tiny",
                model_channels=8,
                channel_mult=[1, 2],
                num_res_blocks=1,
                attention_resolutions=[8],
                num_heads=1,
                dropout=0.0,
                norm_groups=4,
                class_conditional=True,
            ),
        )
    with pytest.raises(UserError, match="2 heads"):
        saved(
            tmp_path,
            group(
                "model",
                "tiny",
                model_channels=8,
                channel_mult=[1, 2],
                num_res_blocks=1,
                attention_resolutions=[8],
                num_heads=2,
                dropout=0.0,
                norm_groups=4,
            ),
        )
    saved(
        tmp_path,
        diffusion=group("diffusion", "sigmoid", num_timesteps=10, prediction_type="epsilon", variance="fixed_small"),
    )
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert len(scheduler["trained_betas"]) == 10


def test_a_hostile_folder_is_refused(tmp_path):
    class Run:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'hacked'}",)

    for content in ("[]", "3", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_trained(tmp_path)
    saved(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    binary = tmp_path / "unet/diffusion_pytorch_model.bin"
    for content in (pickle.dumps(Run()), b"", b"no pickle"):
        binary.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_trained(tmp_path)
    torch.save({"x": Run()}, binary)
    with pytest.raises(UserError, match="is damaged"):
        load_trained(tmp_path)
    assert not (tmp_path / "hacked").exists()
