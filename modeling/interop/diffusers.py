"""Reads and writes models in the folder format of the diffusers library (its DDPMPipeline), without importing it.

A folder holds unet/ (config.json and weights of a UNet2DModel) and scheduler/; the flat layout of the first published
models, such as google/ddpm-cifar10-32, is read too. What the format cannot express is refused by name. A schedule that
diffusers does not know is written, and read, as its betas.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from modeling.diffusion.unet import NORM_EPS
from modeling.interop.weight_names import from_diffusers, to_diffusers
from modeling.reliability.errors import ConfigError, UserError, out_of_memory, short
from modeling.reliability.files import write_atomic

log = logging.getLogger(__name__)
VERSION = "0.42.1"  # of the library that the tests compare with
# Our network in the terms of UNet2DModel, and the library's own default of each.
FIXED: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (NORM_EPS, 1e-5),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
# What else its configurations hold: about the sampler, which is chosen here by the sampler group, or about nothing.
HARMLESS = {"dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset", "set_alpha_to_one"}
HARMLESS |= {"skip_prk_steps", "out_channels", "time_embedding_dim"}  # the last two the weights themselves show
READ = {"sample_size", "in_channels", "block_out_channels", "down_block_types", "up_block_types", "attention_head_dim"}
READ |= {
    "resnet_time_scale_shift",
    "attn_norm_num_groups",
    "prediction_type",
    "variance_type",
    "trained_betas",
    "beta_schedule",
    "beta_start",
    "beta_end",
}
READ |= {"num_train_timesteps", "rescale_betas_zero_snr", "thresholding", "clip_sample", "clip_sample_range"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # the same formulas; its "sigmoid" is another
VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned": "learned_range"}
KEYS = {"num_res_blocks": ("layers_per_block", 2), "dropout": ("dropout", 0.0), "norm_groups": ("norm_num_groups", 32)}


def load_diffusers(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a folder, as load_model returns them; UserError names what cannot be read."""
    unet, scheduler = (part if part.is_dir() else folder for part in (folder / "unet", folder / "scheduler"))
    model, image_shape = _model_config(_read_json(unet / "config.json"), folder)
    diffusion = _diffusion_config(_read_json(scheduler / "scheduler_config.json"), folder)
    ours = from_diffusers(_read_weights(unet), len(model["channel_mult"]), model["num_res_blocks"])
    return {f"network.{name}": tensor for name, tensor in ours.items()}, {
        "config": {"model": model, "diffusion": diffusion},
        "image_shape": image_shape,
        "classes": [],
        "steps": 0,
    }


def _model_config(c: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[int]]:
    _know(c, "config.json", folder)
    for key, (needed, default) in FIXED.items():
        if c.get(key, default) != needed:
            raise UserError(f"{folder}: {key}={c.get(key, default)} in config.json; only {needed} can be read")
    if (shift := c.get("resnet_time_scale_shift", "default")) not in ("default", "scale_shift"):
        raise UserError(f"{folder}: resnet_time_scale_shift={str(shift)[:40]} in config.json cannot be read")
    groups = c.get("norm_num_groups", KEYS["norm_groups"][1])
    if c.get("attn_norm_num_groups") != _middle_groups(groups, shift):  # the middle's attention has no norm, or another
        raise UserError(f"{folder}: attn_norm_num_groups={str(c.get('attn_norm_num_groups'))[:40]} cannot be read")
    try:
        size, widths, kinds = c["sample_size"], c["block_out_channels"], c["down_block_types"]
        height, width = size if isinstance(size, list) else (size, size)
        attends = [{"AttnDownBlock2D": True, "DownBlock2D": False}[kind] for kind in kinds]
        if [kind.replace("Up", "Down") for kind in reversed(c["up_block_types"])] != kinds:
            raise UserError(f"{folder}: up_block_types do not mirror down_block_types; this cannot be read")
        head_dim = c.get("attention_head_dim", 8)
        if any(w % widths[0] for w in widths):
            raise UserError(f"{folder}: block_out_channels={widths} are no multiples of the first; this cannot be read")
        if head_dim and any(w % head_dim for w in _attended(widths, attends)):
            raise UserError(f"{folder}: attention_head_dim={head_dim} does not divide block_out_channels={widths}")
        heads = {w // head_dim if head_dim else 1 for w in _attended(widths, attends)}
        if len(heads) > 1:
            raise UserError(f"{folder}: attention_head_dim={head_dim} gives each resolution another number of heads")
        return {
            "name": "diffusers",
            "patch_size": 1,
            "model_channels": widths[0],
            "channel_mult": [w // widths[0] for w in widths],
            "attention_resolutions": [height >> level for level, attend in enumerate(attends) if attend],
            "num_heads": heads.pop(),
            "scale_shift": shift == "scale_shift",
            "class_conditional": False,
            "weights": None,
            **{ours: c.get(theirs, default) for ours, (theirs, default) in KEYS.items()},
        }, [height, width, c["in_channels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: config.json is not of a UNet2DModel that can be read ({error!r})") from None


def _middle_groups(groups: Any, shift: str) -> Any:
    """What diffusers is told about the norm of the middle's attention; without a word it has one by default only."""
    return groups if shift == "scale_shift" else None


def _know(c: Mapping[str, Any], name: str, folder: Path) -> None:
    """UserError for a key that could change what the model computes and that is not known here."""
    known = {*FIXED, *HARMLESS, *READ, *(theirs for theirs, _ in KEYS.values())}
    for key, value in c.items():
        if key not in known and not key.startswith("_"):
            raise UserError(f"{folder}: {str(key)[:40]}={str(value)[:40]} in {name} is not known; it cannot be read")


def _attended(widths: Sequence[int], attends: Sequence[bool]) -> list[int]:
    return [*(w for w, attend in zip(widths, attends, strict=True) if attend), widths[-1]]  # the middle always attends


def _diffusion_config(c: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def ours(table: Mapping[str, str], key: str, default: str) -> str:
        value = c.get(key, default)
        if value not in table.values():
            allowed = ", ".join(table.values())
            raise UserError(f"{folder}: {key}={value} in scheduler_config.json; allowed are {allowed}")
        return next(name for name, theirs in table.items() if theirs == value)

    _know(c, "scheduler_config.json", folder)
    clips, limit = c.get("clip_sample", True), c.get("clip_sample_range", 1.0)
    if clips and limit != 1:
        raise UserError(f"{folder}: clip_sample_range={str(limit)[:40]} in scheduler_config.json; only 1.0 can be read")
    for key in ("rescale_betas_zero_snr", "thresholding"):
        if c.get(key, False):
            raise UserError(f"{folder}: {key}={str(c[key])[:40]} in scheduler_config.json cannot be read")
    if not clips:
        log.warning("%s: its scheduler does not clip x_0: sampler.clip_denoised=false does the same", folder)
    config = {"prediction_type": c.get("prediction_type", "epsilon"), "min_snr_gamma": None}
    config["variance"] = ours(VARIANCES, "variance_type", "fixed_small")
    if (betas := c.get("trained_betas")) is not None:
        return config | {"schedule": "tabulated", "num_timesteps": len(betas), "betas": betas}
    schedule = ours(SCHEDULES, "beta_schedule", "linear")
    config |= {"schedule": schedule, "num_timesteps": c.get("num_train_timesteps", 1000)}
    if schedule == "linear":
        config |= {"beta_start": c.get("beta_start", 1e-4), "beta_end": c.get("beta_end", 0.02)}
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    paths = [folder / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        raise UserError(f"no {paths[0].name} in {folder}")
    try:
        content = path.read_bytes()
        # weights_only: tensors and plain types; nothing in the file can run.
        read = load_safetensors(content) if path == paths[0] else torch.load(path, weights_only=True)
    except Exception as error:  # what a parser of hostile bytes raises is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        raise UserError(f"model {path} is damaged: {short(error)}") from None
    return read


def save_diffusers(folder: Path, weights: Mapping[str, Tensor], betas: Tensor, meta: Mapping[str, Any]) -> None:
    """Writes weights of our UNet and `betas` [T] as DDPMPipeline reads them; ConfigError if it cannot express them."""
    m, d = meta["config"]["model"], meta["config"]["diffusion"]
    channels, height, width = meta["image_shape"]
    if m.get("class_conditional"):
        raise ConfigError("stage=export: the model is class-conditional, and DDPMPipeline knows no labels")
    if (patch := m.get("patch_size", 1)) != 1:
        raise ConfigError(f"stage=export: model.patch_size={patch}: a network of diffusers sees single pixels")
    if m["channel_mult"][0] != 1:
        first = f"model.channel_mult={m['channel_mult']}"
        raise ConfigError(f"stage=export: {first}: a network of diffusers has model_channels at the first resolution")
    widths = [mult * m["model_channels"] for mult in m["channel_mult"]]
    attends = [height >> level in m["attention_resolutions"] for level in range(len(widths))]
    head_dims = {w // m["num_heads"] for w in _attended(widths, attends)}
    if m["num_heads"] > 1 and len(head_dims) > 1:
        raise ConfigError(f"stage=export: {m['num_heads']} heads at attended resolutions of different widths")
    shift = "scale_shift" if m.get("scale_shift") else "default"
    kinds = ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    network = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": 2 * channels if d["variance"] == "learned" else channels,
        "block_out_channels": widths,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "attention_head_dim": None if m["num_heads"] == 1 else head_dims.pop(),
        "resnet_time_scale_shift": shift,
        "attn_norm_num_groups": _middle_groups(m["norm_groups"], shift),
        **{theirs: m[ours] for ours, (theirs, _) in KEYS.items()},
        **{key: needed for key, (needed, _) in FIXED.items()},
    }
    process = {
        "num_train_timesteps": d["num_timesteps"],
        "prediction_type": d["prediction_type"],
        "variance_type": VARIANCES[d["variance"]],
        "clip_sample": True,
    }
    if d["schedule"] in SCHEDULES:
        process["beta_schedule"] = SCHEDULES[d["schedule"]]
        process |= {key: d[key] for key in ("beta_start", "beta_end") if key in d}
    else:
        process["trained_betas"] = betas.tolist()
    theirs = to_diffusers(weights, len(widths), m["num_res_blocks"])
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}
    write_atomic(folder / "unet/diffusion_pytorch_model.safetensors", safetensors_bytes(tensors, {"format": "pt"}))
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for name, kind, content in (
        ("unet/config.json", "UNet2DModel", network),
        ("scheduler/scheduler_config.json", "DDPMScheduler", process),
        ("model_index.json", "DDPMPipeline", index),
    ):
        content = {"_class_name": kind, "_diffusers_version": VERSION} | content
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
