"""From settings to an untrained DiffusionModel. Only checks that need the data are here, see config.py."""

import logging
from collections.abc import Sequence

import torch

from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.schedule import SCHEDULES, NoiseSchedule
from modeling.diffusion.unet import UNet
from modeling.reliability.errors import ConfigError, require
from modeling.seeds import step_seed
from modeling.settings.groups import DiffusionConfig, ModelConfig, SamplerConfig
from modeling.settings.keys import affects, own_keys
from modeling.settings.sizes import misfit

log = logging.getLogger(__name__)
SIGNAL_LEFT = 0.01  # of the image's variance at the last time step: more spoils the samples. Ho et al. 2020 leave 4e-5


def check_image_size(m: ModelConfig, height: int, width: int) -> None:
    """Raises ConfigError unless the network fits the images."""
    if why := misfit(m, height, width):
        raise ConfigError(why)


def check_sampler(
    s: SamplerConfig, num_timesteps: int, classes: Sequence[str], label_dropout: float, has_guide: bool
) -> None:
    """Raises ConfigError unless a model can be sampled from as the sampler group says.

    `classes` are those of a class-conditional model, else none; `label_dropout` is that of its training; `has_guide`:
    the model has, or will have, a guide.
    """
    require(s.steps <= num_timesteps, "sampler.steps", s.steps, f"the model has {num_timesteps} time steps")
    guided = s.guidance_scale != 1
    why = "the model is not class-conditional"
    require(bool(classes) or not guided, "sampler.guidance_scale", s.guidance_scale, why)
    require(bool(classes) or s.label is None, "sampler.label", s.label, why)
    why = "with trainer.label_dropout=0 the model learns no prediction without a label"
    require(label_dropout > 0 or not guided, "sampler.guidance_scale", s.guidance_scale, why)
    why = "the model has no guide; 1 is none, and trainer.guide_at=0.5 keeps one in training"
    require(has_guide or s.autoguidance_scale == 1, "sampler.autoguidance_scale", s.autoguidance_scale, why)
    allowed = f"allowed are {', '.join(classes)}, or null for all"
    require(s.label is None or s.label in classes, "sampler.label", s.label, allowed)


def build_model(
    model: ModelConfig,
    diffusion: DiffusionConfig,
    image_shape: Sequence[int],
    num_classes: int,
    seed: int,
    has_guide: bool = False,
) -> DiffusionModel:
    """The untrained model, its initial weights a function of `seed`; ConfigError if it does not fit the data.

    `image_shape` is (C, H, W); `num_classes`, of the data, is used if the model is class-conditional; `has_guide`: with
    a second network, for the weights of a guide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "init", 0))
        network = build_network(model, diffusion, image_shape, num_classes)
        guide = build_network(model, diffusion, image_shape, num_classes) if has_guide else None
    d = diffusion
    return DiffusionModel(network, build_schedule(d), d.prediction_type, d.variance, d.min_snr_gamma, guide)


def build_network(m: ModelConfig, diffusion: DiffusionConfig, image_shape: Sequence[int], num_classes: int) -> UNet:
    """The network alone, its weights from the global generator; arguments and errors as in build_model."""
    channels, height, width = image_shape
    check_image_size(m, height, width)
    options = affects(m, "weights")
    conditional = options.pop("class_conditional")
    classes_fit = num_classes > 1 or not conditional
    require(classes_fit, "model.class_conditional", True, "the data has no classes (for a folder: sub-folders)")
    out_channels = 2 * channels if diffusion.variance == "learned" else channels
    return UNet(height, channels, out_channels=out_channels, num_classes=num_classes if conditional else 0, **options)


def check_schedule(config: DiffusionConfig) -> None:
    """Raises ConfigError as build_schedule does; warns of a schedule that ends before it reaches noise."""
    left = build_schedule(config).alphas_cumprod[-1].item()
    if left > SIGNAL_LEFT:
        log.warning(
            "diffusion: alphas_cumprod ends at %.2g: x_T still shows the image, and sampling begins with noise that "
            "training never sees: choose diffusion=linear_scaled, diffusion=cosine or more diffusion.num_timesteps",
            left,
        )


def build_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The noise schedule of the diffusion group; ConfigError if its constants cannot be told from 0 or 1."""
    try:
        return NoiseSchedule(SCHEDULES[config.schedule](config.num_timesteps, **own_keys(config)))
    except ValueError as error:
        raise ConfigError(f"diffusion.schedule={config.schedule}: {error}") from None
