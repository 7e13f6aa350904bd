"""Model files: published weights as safetensors, whose metadata carry the configuration.

So `load_trained` needs nothing but the file. Nothing is unpickled, and a checksum of the weights is verified.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from modeling.build import build_model, build_network
from modeling.diffusion.model import DiffusionModel
from modeling.interop.diffusers import load_diffusers
from modeling.reliability.errors import ConfigError, UserError, out_of_memory, short
from modeling.reliability.files import write_atomic
from modeling.settings import MAX_TIMESTEPS, Config, DiffusionConfig, ModelConfig, affects, parse_group

RUN_NAME = re.compile(r"[A-Za-z0-9-]+")


def save_model(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes weights as safetensors, with `config` and a checksum of the weights as JSON in the metadata.

    Raises:
        UserError: the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # All in one entry: the order of several would differ from process to process.
    held = json.dumps({**config, "sha256": weights_hash(contiguous)}, sort_keys=True)
    write_atomic(path, safetensors_bytes(contiguous, {"config": held}))


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a published model.

    Raises:
        UserError: missing, damaged, or not written by save_model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        config: dict[str, Any] = json.loads(metadata["config"])
        if config["sha256"] != weights_hash(tensors):
            raise ValueError("its weights are not those that were saved")
        return tensors, config
    except FileNotFoundError:
        raise UserError(f"no model in {path}: train one first (stage=train) or name a file") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"model {path} is damaged: {error}") from None
    except KeyError:
        raise UserError(f"model {path} carries no configuration: it was not written by this project") from None


def architecture(model: ModelConfig, diffusion: DiffusionConfig) -> dict[str, Any]:
    """The keys of the two groups that a set of trained weights fits."""
    groups = {"model": affects(model, "weights"), "diffusion": affects(diffusion, "weights")}
    del groups["model"]["dropout"], groups["diffusion"]["min_snr_gamma"]
    if diffusion.variance != "learned":  # the fixed ones can be chosen when sampling
        groups["diffusion"]["variance"] = "fixed"
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def load_trained(path: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model from its file or from a folder of diffusers, in eval mode on the CPU, and its metadata.

    stages/train.py says what the metadata hold.

    Raises:
        UserError: missing, damaged, or the weights do not fit the architecture that the file names.
    """
    try:
        tensors, meta = load_diffusers(path) if path.is_dir() else load_model(path)
        meta["sha256"] = weights_hash(tensors)
        if not RUN_NAME.fullmatch(meta["run"]) or not isinstance(
            meta["steps"], int
        ):  # part of a path, and of W&B's axis
            raise ValueError(f"it names the run {meta['run']!r} and the steps {meta['steps']!r}")
        if "data" in meta["config"]:
            parse_group("data", meta["config"]["data"])
        model = parse_group("model", meta["config"]["model"])
        diffusion = parse_group("diffusion", meta["config"]["diffusion"])
        num_classes = len(meta["classes"])
        _check_sizes(tensors, model, diffusion, meta["image_shape"], num_classes)
        trained = build_model(model, diffusion, meta["image_shape"], num_classes, seed=0)
        trained.load_state_dict(tensors)
    except UserError:
        raise
    except Exception as error:  # what hostile metadata lead to is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        raise UserError(f"model {path} is not what it says: {type(error).__name__}: {short(error)}") from None
    return trained.eval(), meta


def _check_sizes(
    tensors: dict[str, Tensor], model: ModelConfig, diffusion: DiffusionConfig, image_shape: list[int], num_classes: int
) -> None:
    """Raises ValueError unless a file holds the network that it names: a small file may name a giant."""
    if max(model.num_res_blocks, len(model.channel_mult)) > len(tensors) or diffusion.num_timesteps > MAX_TIMESTEPS:
        raise ValueError("its metadata name sizes that its tensors do not have")
    with torch.device("meta"):  # shapes without memory
        network = build_network(model, diffusion, image_shape, num_classes)
    shapes = {f"network.{name}": tensor.shape for name, tensor in network.state_dict().items()}
    for name in sorted({*shapes, *tensors}):
        held = tuple(tensors[name].shape) if name in tensors else None
        if tuple(shapes.get(name, ())) != held or name not in shapes:
            raise ValueError(f"{name} has the shape {held}, expected is {tuple(shapes.get(name, ()))}")


def check_agrees(path: Path, meta: dict[str, Any], model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Raises ConfigError, which names the first key that differs, unless a configuration fits a model file."""
    groups = {group: parse_group(group, meta["config"][group]) for group in ("model", "diffusion")}
    asked, held = architecture(model, diffusion), architecture(groups["model"], groups["diffusion"])
    # The schedule first: it decides which other keys there are.
    for key in sorted({*asked, *held}, key=lambda key: (key != "diffusion.schedule", key)):
        if asked.get(key) != held.get(key):
            group, name = key.split(".")
            value = getattr({"model": model, "diffusion": diffusion}[group], name, None)
            has = getattr(groups[group], name, None)
            raise ConfigError(f"{key}={value}: the model in {path} has {has}; leave it out")


def asked_group(config: Config, group: str, held: Any) -> Any:
    """The group that the user wants of a model file: the file's, with the keys that the user typed; or a chosen one.

    Raises:
        ConfigError: a key that the file's choice of the group does not have.
    """
    typed = [key.split(".")[1] for key in config.named if key.startswith(f"{group}.") and key != "model.weights"]
    if group in config.named or "experiment" in config.named:
        return getattr(config, group)
    for key in typed:
        if not hasattr(held, key):
            raise ConfigError(f"{group}.{key}: the model has another {group}, without such a key; leave it out")
    return dataclasses.replace(held, **{key: getattr(getattr(config, group), key) for key in typed})
