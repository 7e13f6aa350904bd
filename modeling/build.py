"""From settings to objects: the diffusion model and its optimizer.

Checks here are those that need the data; all others are in config.py. A trained model is read in trained.py.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modeling.batches import step_seed
from modeling.diffusion import DiffusionModel
from modeling.errors import ConfigError
from modeling.schedule import NoiseSchedule, cosine_betas, linear_betas, sigmoid_betas
from modeling.settings import (
    AdamConfig,
    AdamWConfig,
    DiffusionConfig,
    LinearConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SGDConfig,
    SigmoidConfig,
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


def check_sampler(s: SamplerConfig, num_timesteps: int, classes: Sequence[str], label_dropout: float) -> None:
    """Checks that a model can be sampled from as the sampler group asks.

    Args:
        s: the sampler group.
        num_timesteps: T of the model.
        classes: of a class-conditional model; empty: it takes no labels.
        label_dropout: that the model is trained with.

    Raises:
        ConfigError: more steps than T, a label that does not exist, or guidance that the model does not learn.
    """
    _require(s.steps <= num_timesteps, "sampler.steps", s.steps, f"the model has {num_timesteps} time steps")
    guided = s.guidance_scale != 1
    why = "the model is not class-conditional"
    _require(bool(classes) or not guided, "sampler.guidance_scale", s.guidance_scale, why)
    _require(bool(classes) or s.label is None, "sampler.label", s.label, why)
    why = "with trainer.label_dropout=0 the model learns no prediction without a label"
    _require(label_dropout > 0 or not guided, "sampler.guidance_scale", s.guidance_scale, why)
    allowed = f"allowed are {', '.join(classes)}, or null for all"
    _require(s.label is None or s.label in classes, "sampler.label", s.label, allowed)


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {allowed}")


def build_model(
    model: ModelConfig, diffusion: DiffusionConfig, image_shape: Sequence[int], num_classes: int, seed: int
) -> DiffusionModel:
    """The untrained model, its initial weights a function of `seed`.

    Args:
        image_shape: (H, W, C).
        num_classes: of the data; used if the model is class-conditional.

    Raises:
        ConfigError: the network does not fit the images, or it is class-conditional and there are no classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "init", 0))
        network = build_network(model, diffusion, image_shape, num_classes)
    return DiffusionModel(
        network, build_schedule(diffusion), diffusion.prediction_type, diffusion.variance, diffusion.min_snr_gamma
    )


def build_network(model: ModelConfig, diffusion: DiffusionConfig, image_shape: Sequence[int], num_classes: int) -> UNet:
    """The network alone, its weights from the global generator; arguments and errors as in build_model."""
    height, width, channels = image_shape
    check_image_size(model, height, width)
    classes_fit = num_classes > 1 or not model.class_conditional
    _require(classes_fit, "model.class_conditional", True, "the data has no classes (for a folder: sub-folders)")
    return UNet(
        height,
        channels,
        model.model_channels,
        model.channel_mult,
        model.num_res_blocks,
        model.attention_resolutions,
        model.num_heads,
        model.dropout,
        model.norm_groups,
        out_channels=2 * channels if diffusion.variance == "learned" else channels,
        num_classes=num_classes if model.class_conditional else 0,
    )


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The noise schedule that the diffusion group names.

    Raises:
        ConfigError: its constants cannot be told from 0 or 1.
    """
    if isinstance(config, LinearConfig):
        betas = linear_betas(config.num_timesteps, config.beta_start, config.beta_end)
    elif isinstance(config, SigmoidConfig):
        betas = sigmoid_betas(config.num_timesteps, config.start, config.end, config.tau)
    else:
        betas = cosine_betas(config.num_timesteps)
    try:
        return NoiseSchedule(betas)
    except ValueError as error:
        raise ConfigError(f"diffusion.schedule={config.schedule}: {error}") from None


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
