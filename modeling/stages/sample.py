"""Stage `sample`: N images from a trained model, as single PNGs and as a grid.

The network comes from the model file; groups that the user named must agree with it.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.build import check_sampler
from modeling.device import Compute, choose_compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import is_first
from modeling.drawing import draw_samples, sample_grid
from modeling.files import cannot_write, make_writable
from modeling.images import png_bytes, save_png
from modeling.paths import state_root
from modeling.settings import Config, DataConfig, SamplerConfig
from modeling.signals import poll
from modeling.trained import asked_group, check_agrees, load_trained, parse_group

log = logging.getLogger(__name__)


def trained_model(config: Config, out: Path) -> tuple[DiffusionModel, dict[str, Any], DataConfig]:
    """The model to sample or evaluate, its metadata, and the data set that goes with it.

    The file: model.weights (or a folder of diffusers), else models/model.safetensors under `out` or else under the
    repository. What the user did not name (model, diffusion, data) is what the file says.

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
    asked_diffusion = asked_group(config, "diffusion", parse_group("diffusion", held["diffusion"]))
    asked_model = asked_group(config, "model", parse_group("model", held["model"]))
    check_agrees(path, meta, asked_model, asked_diffusion)
    model.variance = asked_diffusion.variance  # agrees if it is learned; the fixed ones are free
    named = config.names("data") or "data" not in held  # a foreign model does not say what it was trained on
    data: DataConfig = config.data if named else parse_group("data", held["data"])
    return model, meta, data


def check_asked(model: DiffusionModel, meta: dict[str, Any], config: Config) -> None:
    """Checks, before any work, that the model can be sampled from as the sampler group asks.

    Raises:
        ConfigError: it cannot.
    """
    classes = meta["classes"] if model.num_classes else []
    dropout = meta["config"].get("trainer", {}).get("label_dropout", 0.0)
    check_sampler(config.sampler, model.schedule.num_timesteps, classes, dropout)


def place_trained(model: DiffusionModel, sampler: SamplerConfig, compute: Compute) -> DiffusionModel:
    """The model on the device, its network compiled if the sampler group asks for it.

    Raises:
        ConfigError: it does, and no compiler works here.
    """
    model = compute.place_model(model)
    if sampler.compile:
        # Its method, not the module: the names of the weights stay.
        model.network.forward = compute.compiled(model.network.forward, True, "sampler")
    return model


def asked_samples(
    model: DiffusionModel, meta: dict[str, Any], config: Config, indices: range, compute: Compute
) -> Tensor:
    """Samples number `indices` as the sampler group asks for them, uint8 [N, C, H, W]."""
    s = config.sampler
    height, width, channels = meta["image_shape"]
    label = None if s.label is None else meta["classes"].index(s.label)
    return draw_samples(model, s, indices, (channels, height, width), compute, label)


def run(config: Config, out: Path) -> None:
    """Writes samples/00000.png and so on, and samples.png, under `out`.

    Raises:
        UserError: bad model file, or the output cannot be written.
    """
    compute = choose_compute(config.device, config.precision, config.deterministic)
    model, meta, _ = trained_model(config, out)
    check_asked(model, meta, config)
    model = place_trained(model, config.sampler, compute)
    folder = out / "samples"
    if is_first():
        make_writable(folder)
    images = asked_samples(model, meta, config, range(config.sampler.num_samples), compute)
    if not is_first():
        return
    _replace(folder, images)
    save_png(out / "samples.png", sample_grid(images, model.num_classes if config.sampler.label is None else 0))
    log.info("%d samples: %s, grid: %s", len(images), folder, out / "samples.png")


def _replace(folder: Path, images: Tensor) -> None:
    """Puts images into the folder as 00000.png and so on; the earlier set stays until all of the new one is written."""
    partial = folder / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for k, image in enumerate(images):
            poll()
            (partial / f"{k:05}.png").write_bytes(png_bytes(image.permute(1, 2, 0)))
        for old in folder.glob("[0-9]*.png"):  # there may be more of them
            if not (partial / old.name).exists():
                old.unlink()
        for new in sorted(partial.iterdir()):
            new.replace(folder / new.name)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
