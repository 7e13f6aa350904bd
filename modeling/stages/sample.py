"""Stage `sample`: N images from a trained model, as single PNGs and as a grid.

The network comes from the model file; groups that the user named must agree with it.
"""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.build import check_agrees, load_trained, parse_group
from modeling.device import Compute, choose_compute
from modeling.diffusion import DiffusionModel
from modeling.errors import ConfigError
from modeling.files import make_writable
from modeling.images import image_grid, save_png
from modeling.paths import state_root
from modeling.sampling import draw_samples
from modeling.settings import Config, DataConfig, DDIMConfig

log = logging.getLogger(__name__)


def trained_model(config: Config, out: Path) -> tuple[DiffusionModel, dict[str, Any], DataConfig]:
    """The model to sample or evaluate, its metadata, and the data set that goes with it.

    The file: model.weights, else models/model.safetensors under `out` or else under the repository. What the user did
    not name (model, diffusion, data) is what the file says.

    Raises:
        UserError: no such file, damaged, or another network than the one that the user named.
    """
    path = out / "models" / "model.safetensors"
    if config.model.weights is not None:
        path = Path(config.model.weights)
    elif config.out_dir is None and not path.exists():
        path = state_root() / "models" / "model.safetensors"
    model, meta = load_trained(path)
    held = meta["config"]
    asked_diffusion = config.diffusion if config.names("diffusion") else parse_group("diffusion", held["diffusion"])
    asked_model = config.model if config.names("model") else parse_group("model", held["model"])
    check_agrees(path, meta, asked_model, asked_diffusion)
    model.variance = asked_diffusion.variance
    data: DataConfig = config.data if config.names("data") else parse_group("data", held["data"])
    return model, meta, data


def grid_samples(model: DiffusionModel, meta: dict[str, Any], config: Config, compute: Compute) -> Tensor:
    """The samples that the sampler group asks for, uint8 [N, C, H, W]."""
    s = config.sampler
    height, width, channels = meta["image_shape"]
    if s.steps > model.schedule.num_timesteps:
        raise ConfigError(f"sampler.steps={s.steps}: the model has {model.schedule.num_timesteps} time steps")
    return draw_samples(
        model,
        range(s.num_samples),
        (channels, height, width),
        compute,
        name=s.name,
        steps=s.steps,
        eta=s.eta if isinstance(s, DDIMConfig) else 1.0,
        clip_denoised=s.clip_denoised,
        batch_size=s.batch_size,
        seed=s.seed,
    )


def run(config: Config, out: Path) -> None:
    """Writes samples/00000.png and so on, and samples.png, under `out`.

    Raises:
        UserError: bad model file, or the output cannot be written.
    """
    compute = choose_compute(config.device, config.precision)
    model, meta, _ = trained_model(config, out)
    folder = out / "samples"
    make_writable(folder)
    images = grid_samples(compute.place_model(model), meta, config, compute)
    for k, image in enumerate(images):
        save_png(folder / f"{k:05}.png", image.permute(1, 2, 0))
    save_png(out / "samples.png", image_grid(images))
    log.info("%d samples: %s, grid: %s", len(images), folder, out / "samples.png")
