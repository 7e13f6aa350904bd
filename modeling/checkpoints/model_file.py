"""Models: published weights as safetensors, whose metadata carry configuration and checksum, or those of a checkpoint.

Nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from modeling.build import build_model, build_network
from modeling.checkpoints.checkpoint import Damaged, checkpoints, read_checkpoint
from modeling.diffusion.model import DiffusionModel
from modeling.interop.diffusers import load_diffusers
from modeling.reliability.errors import ConfigError, UserError, out_of_memory, short
from modeling.reliability.files import write_atomic
from modeling.settings.groups import MAX_TIMESTEPS, Config, parse_group
from modeling.settings.keys import affects

NETWORK, GUIDE = "network.", "guide."  # before the names of the weights of each
FREE = ("dropout", "min_snr_gamma")  # keys that affect how weights are trained, and not which weights fit


def save_model(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Writes weights as safetensors, with `about` as JSON in the metadata; returns their weights_hash."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256 = weights_hash(contiguous)
    # All in one entry: the order of several would differ from process to process.
    metadata = json.dumps({**about, "sha256": sha256}, sort_keys=True)
    write_atomic(path, safetensors_bytes(contiguous, {"config": metadata}))
    return sha256


def with_guide(average: Mapping[str, Tensor], guide: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of a model file: the averaged weights of a DiffusionModel, and those of its guide's network."""
    return {**average, **{GUIDE + name: tensor for name, tensor in (guide or {}).items()}}


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that save_model has written; UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        about: dict[str, Any] = json.loads(metadata["config"])
        if about["sha256"] != weights_hash(tensors):
            raise ValueError("its weights are not those that were saved")
        return tensors, about
    except FileNotFoundError:
        raise UserError(f"no model in {path}: train one first (stage=train) or name a file") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"model {path} is damaged: {error}") from None
    except KeyError:
        raise UserError(f"model {path} carries no configuration: it was not written by this project") from None


def _load_average(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights in a checkpoint, as a training that ended there would publish them; else UserError."""
    try:
        state = read_checkpoint(path)
    except Damaged as error:
        raise UserError(f"checkpoint {path} is damaged: {error}") from None
    about = dict(state["about"]) | {"steps": state["step"]}
    recipe = about.get("config", {}).get("sampler", {})
    if state.get("guide") is None and "autoguidance_scale" in recipe:  # not yet
        recipe["autoguidance_scale"] = 1.0
    return with_guide(state["ema"]["model"], state.get("guide")), about


def newest(path: Path) -> Path:
    """The newest checkpoint of a run's folder; any other path itself."""
    return max(checkpoints(path), default=path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = newest(path)
    if (path / "run.json").exists():
        raise UserError(f"no checkpoint in {path} yet: see trainer.checkpoint_every")
    if path.is_dir():
        return load_diffusers(path)
    return _load_average(path) if path.suffix == ".pt" and path.exists() else load_model(path)


def load_trained(path: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model in eval mode on the CPU, and its metadata (stages/train.py).

    `path` is a model file, a checkpoint, the folder of a run (its newest checkpoint counts), or a folder of diffusers.
    Here the image shape is (C, H, W) as everywhere in Python; in the file it is (H, W, C).
    """
    try:
        tensors, meta = _load(path)
        meta["sha256"] = weights_hash(tensors)
        if not isinstance(meta["steps"], int):
            raise ValueError(f"it names the steps {meta['steps']!r}")
        height, width, channels = meta["image_shape"]
        meta["image_shape"] = [channels, height, width]
        names = ["model", "diffusion", *({"data"} & meta["config"].keys())]
        model, diffusion, *_ = (parse_group(name, meta["config"][name]) for name in names)
        own = {k.removeprefix(NETWORK): tensor for k, tensor in tensors.items() if not k.startswith(GUIDE)}
        # A small file may name a giant, so the sizes are checked first, on a network without memory.
        if max(model.num_res_blocks, len(model.channel_mult)) > len(tensors) or diffusion.num_timesteps > MAX_TIMESTEPS:
            raise ValueError("its metadata name sizes that its tensors do not have")
        with torch.device("meta"):
            network = build_network(model, diffusion, meta["image_shape"], len(meta["classes"]))
        network.load_state_dict(own, assign=True)
        has_guide = len(own) < len(tensors)
        trained = build_model(model, diffusion, meta["image_shape"], len(meta["classes"]), 0, has_guide)
        trained.load_state_dict(tensors)
    except UserError:
        raise
    except Exception as error:  # what hostile metadata lead to is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        raise UserError(f"model {path} is not what it says: {type(error).__name__}: {short(error)}") from None
    return trained.eval(), meta


def requested_variance(config: Config, path: Path, meta: Mapping[str, Any]) -> str:
    """The variance to sample with: the file's, unless another is requested; ConfigError if the weights do not fit."""
    variance: str = meta["config"]["diffusion"]["variance"]
    for group in ("diffusion", "model"):
        own = affects(parse_group(group, meta["config"][group]), "weights")
        requested = affects(getattr(config, group), "weights")
        if not {group, "experiment"} & config.named:  # then single keys, if any
            requested = {key: value for key, value in requested.items() if f"{group}.{key}" in config.named}
        variance = requested.get("variance", variance)
        for key, value in requested.items():  # the schedule is the first: it decides which other keys there are
            if key not in own:
                raise ConfigError(f"{group}.{key}: the model has another {group}, without such a key; leave it out")
            free = key in FREE or (key == "variance" and "learned" not in (value, own[key]))
            if value != own[key] and not free:
                raise ConfigError(f"{group}.{key}={value}: the model in {path} has {own[key]}; leave it out")
    return variance
