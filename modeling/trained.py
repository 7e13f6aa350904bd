"""A trained model from its file, and whether a configuration asks for that model.

A published model carries its whole configuration, so that `load_trained` needs nothing but the file.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.build import build_model, build_network
from modeling.checkpoint import load_model, weights_hash
from modeling.diffusers_format import load_diffusers
from modeling.diffusion import DiffusionModel
from modeling.errors import ConfigError, UserError
from modeling.faults import out_of_memory
from modeling.settings import CHOICES, GROUPS, MAX_TIMESTEPS, Config, DiffusionConfig, ModelConfig

RUN = re.compile(r"[A-Za-z0-9-]+")  # the name of a run's folder


def architecture(model: ModelConfig, diffusion: DiffusionConfig) -> dict[str, Any]:
    """What of the two groups a set of trained weights depends on."""
    groups = {"model": dataclasses.asdict(model), "diffusion": dataclasses.asdict(diffusion)}
    for key in ("name", "weights", "dropout"):
        del groups["model"][key]
    del groups["diffusion"]["min_snr_gamma"]
    if diffusion.variance != "learned":  # the fixed ones can be chosen when sampling
        groups["diffusion"]["variance"] = "fixed"
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def load_trained(path: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model from its file, or from a folder of diffusers; in eval mode on the CPU, with its metadata.

    Published files: see stages/train.py for what the metadata hold.

    Raises:
        UserError: missing, damaged, or the weights are not those of the architecture that the file names.
    """
    try:
        tensors, meta = load_diffusers(path) if path.is_dir() else load_model(path)
        meta["sha256"] = weights_hash(tensors)
        if not RUN.fullmatch(meta["run"]) or not isinstance(meta["steps"], int):  # part of a path, and of W&B's axis
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
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"model {path} is not what it says: {reason}") from None
    return trained.eval(), meta


def _check_sizes(
    tensors: dict[str, Tensor], model: ModelConfig, diffusion: DiffusionConfig, image_shape: list[int], num_classes: int
) -> None:
    """Checks that a file holds the network that it names before memory is taken for it: a small file may name a giant.

    Raises:
        ValueError: it does not.
    """
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
    """Checks that a configuration asks for the network that a model file holds.

    Raises:
        ConfigError: it does not; the message names the first key that differs.
    """
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
    """What the user asks a model file for: its own group, with the keys that he has typed; or the one he has chosen.

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


def parse_group(group: str, values: dict[str, Any]) -> Any:
    """The dataclass of a group from the plain values that a model file holds."""
    if group in GROUPS:
        return GROUPS[group](**values)
    key, choices = CHOICES[group]
    return choices[values[key]](**values)
