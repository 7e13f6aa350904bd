"""From settings to objects: the diffusion model, its optimizer, and a trained model from its file.

A published model carries its whole configuration, so that `load_trained` needs nothing but the file. Checks here are
those that need the data or a file; all others are in config.py.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.checkpoint import load_model
from modeling.data import step_seed
from modeling.diffusion import DiffusionModel
from modeling.errors import ConfigError, UserError
from modeling.schedule import NoiseSchedule, cosine_betas, linear_betas
from modeling.settings import (
    CHOICES,
    GROUPS,
    AdamConfig,
    AdamWConfig,
    DiffusionConfig,
    LinearConfig,
    ModelConfig,
    OptimizerConfig,
    SGDConfig,
)
from modeling.unet import UNet


def check_image_size(m: ModelConfig, height: int, width: int) -> None:
    """Checks that the network fits the images, once the data is known.

    Raises:
        ConfigError: not square, not divisible by the downsampling, or attention at a resolution that does not occur.
    """
    _require(height == width, "data", f"{width} x {height} pixels", "the images must be square")
    factor = 2 ** (len(m.channel_mult) - 1)
    why = f"images of {height} pixels must be divisible by {factor}, for {len(m.channel_mult)} resolutions"
    _require(height % factor == 0, "model.channel_mult", m.channel_mult, why)
    sizes = [height >> level for level in range(len(m.channel_mult))]
    for size in m.attention_resolutions:
        _require(size in sizes, "model.attention_resolutions", size, f"the resolutions are {sizes}")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {allowed}")


def build_model(
    model: ModelConfig, diffusion: DiffusionConfig, image_shape: Sequence[int], seed: int
) -> DiffusionModel:
    """The untrained model, its initial weights a function of `seed`.

    Args:
        image_shape: (H, W, C).

    Raises:
        ConfigError: the network does not fit the images.
    """
    height, width, channels = image_shape
    check_image_size(model, height, width)
    if isinstance(diffusion, LinearConfig):
        betas = linear_betas(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)
    else:
        betas = cosine_betas(diffusion.num_timesteps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "init", 0))
        network = UNet(
            height,
            channels,
            model.model_channels,
            model.channel_mult,
            model.num_res_blocks,
            model.attention_resolutions,
            model.num_heads,
            model.dropout,
            model.norm_groups,
        )
    return DiffusionModel(network, NoiseSchedule(betas), diffusion.prediction_type, diffusion.variance)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer at its full learning rate; warm-up and decay are the training loop's."""
    if isinstance(config, AdamWConfig):
        betas = (config.betas[0], config.betas[1])
        return torch.optim.AdamW(parameters, config.lr, betas, config.eps, config.weight_decay, fused=True)
    if isinstance(config, AdamConfig):
        return torch.optim.Adam(parameters, config.lr, (config.betas[0], config.betas[1]), config.eps, fused=True)
    assert isinstance(config, SGDConfig)
    return torch.optim.SGD(
        parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def architecture(model: ModelConfig, diffusion: DiffusionConfig) -> dict[str, Any]:
    """What of the two groups a set of trained weights depends on."""
    groups = {"model": dataclasses.asdict(model), "diffusion": dataclasses.asdict(diffusion)}
    for group, key in (("model", "name"), ("model", "weights"), ("model", "dropout"), ("diffusion", "variance")):
        del groups[group][key]
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def load_trained(path: Path) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model from its file, in eval mode on the CPU, and the file's metadata (see stages/train.py).

    Raises:
        UserError: missing, damaged, or the weights are not those of the architecture that the file names.
    """
    tensors, meta = load_model(path)
    try:
        model = parse_group("model", meta["config"]["model"])
        diffusion = parse_group("diffusion", meta["config"]["diffusion"])
        trained = build_model(model, diffusion, meta["image_shape"], seed=0)
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
