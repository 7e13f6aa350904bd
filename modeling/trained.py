"""A trained model from its file, and whether a configuration asks for that model.

A published model carries its whole configuration, so that `load_trained` needs nothing but the file.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from modeling.build import build_model
from modeling.checkpoint import load_model
from modeling.diffusers_format import load_diffusers
from modeling.diffusion import DiffusionModel
from modeling.errors import ConfigError, UserError
from modeling.settings import CHOICES, GROUPS, DiffusionConfig, ModelConfig


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
    tensors, meta = load_diffusers(path) if path.is_dir() else load_model(path)
    weights = b"".join(name.encode() + tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
    meta["sha256"] = hashlib.sha256(weights).hexdigest()  # of the weights, whatever file they came in
    try:
        model = parse_group("model", meta["config"]["model"])
        diffusion = parse_group("diffusion", meta["config"]["diffusion"])
        trained = build_model(model, diffusion, meta["image_shape"], len(meta["classes"]), seed=0)
        trained.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model {path} is of another architecture than it says: {reason}") from None
    return trained.eval(), meta


def check_agrees(path: Path, meta: dict[str, Any], model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Checks that a configuration asks for the network that a model file holds.

    Raises:
        ConfigError: it does not; the message names the first key that differs.
    """
    asked = architecture(model, diffusion)
    groups = meta["config"]
    held = architecture(parse_group("model", groups["model"]), parse_group("diffusion", groups["diffusion"]))
    for key in sorted({*asked, *held}):
        if asked.get(key) != held.get(key):
            raise ConfigError(f"{key}={asked.get(key)}: the model in {path} has {held.get(key)}; leave it out")


def parse_group(group: str, values: dict[str, Any]) -> Any:
    """The dataclass of a group from the plain values that a model file holds."""
    if group in GROUPS:
        return GROUPS[group](**values)
    key, choices = CHOICES[group]
    return choices[values[key]](**values)
