"""Stage `sample`: N images from a trained model, as single PNGs and as a grid.

The network comes from the model file; groups that the user named must agree with it.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.build import check_sampler
from modeling.checkpoints.fingerprint import code_hash, fingerprint
from modeling.checkpoints.model_file import load_trained, newest, requested_variance
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import from_first, is_first, world_size
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import png_bytes
from modeling.inference.kept import kept_samples
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import UserError
from modeling.reliability.files import existing, make_writable, replacing_folder, state_root
from modeling.reliability.signals import poll
from modeling.reporting.pictures import in_rows, save_picture
from modeling.settings.groups import Config, DataConfig, SamplerConfig, parse_group

log = logging.getLogger(__name__)


def load_for(config: Config, out: Path) -> tuple[DiffusionModel, dict[str, Any], DataConfig]:
    """The model to sample, evaluate or export, its metadata, and the data set that belongs to it.

    It is that of model.weights (see load_trained), else models/model.safetensors under `out` or else under the
    repository. What the user did not name (model, diffusion, data) is taken from the file; what the user did must fit.
    """
    path = out / "models" / "model.safetensors"
    if config.model.weights is not None:
        given = existing("model.weights", config.model.weights)
        path = Path(from_first(lambda: str(newest(given))))  # a training may save another one while others read
    elif config.out_dir is None and not path.exists():
        path = state_root() / "models" / "model.safetensors"
    model, meta = load_trained(path)
    model.variance = requested_variance(config, path, meta)
    # A foreign model does not say what it was trained on.
    named = config.names("data") or "data" not in meta["config"]
    data: DataConfig = config.data if named else parse_group("data", meta["config"]["data"])
    return model, meta, data


def check_sampling(config: Config, model: DiffusionModel, meta: dict[str, Any]) -> None:
    """Raises ConfigError, before any work, unless the model can be sampled from as the sampler group says."""
    classes = meta["classes"] if model.num_classes else []
    dropout = meta["config"].get("trainer", {}).get("label_dropout", 0.0)
    check_sampler(config.sampler, model.schedule.num_timesteps, classes, dropout, model.guide is not None)


def place_trained(model: DiffusionModel, sampler: SamplerConfig, compute: Compute) -> DiffusionModel:
    """The model on the device, its network and its guide compiled if sampler.compile says so."""
    model = compute.place_model(model)
    if sampler.compile:
        guide = None if sampler.autoguidance_scale == 1 else model.guide
        for network in filter(None, (model.network, guide)):
            # Its method, not the module: the names of the weights stay.
            network.forward = compute.compiled(network.forward, True)
    return model


def as_recipe(config: Config, meta: dict[str, Any]) -> Config:
    """The configuration, with the sampler that the model's recipe names but for what the user named."""
    recipe, own = meta["config"].get("sampler"), config.sampler
    if recipe is None or {"sampler", "experiment"} & config.named:
        return config
    common = {f.name: getattr(own, f.name) for f in fields(SamplerConfig)}
    common["spacing"] = "uniform"  # of files from before there was a choice
    named = {key: value for key, value in vars(own).items() if f"sampler.{key}" in config.named}
    try:
        sampler: SamplerConfig = parse_group("sampler", common | recipe | named)
        checks: list[Any] = [(getattr(sampler, f.name), f.type, f.metadata.get("holds")) for f in fields(sampler)]
        if sampler.steps < 1 or not all(isinstance(v, kind) and (not holds or holds(v)) for v, kind, holds in checks):
            raise ValueError
    except (KeyError, TypeError, ValueError):  # a file may lie
        raise UserError(
            f"the model's recipe names no valid sampler: {str(recipe)[:160]}; name one: sampler=ddim"
        ) from None
    if sampler != own:
        log.info("sampler of the model's recipe: %s", sampler.caption())
    return replace(config, sampler=sampler)


def sampling_facts(config: Config, model: DiffusionModel, meta: dict[str, Any], compute: Compute) -> dict[str, Any]:
    """What makes samples comparable."""
    s = config.sampler
    options = {k: v for k, v in vars(s).items() if k not in ("name", "steps", "num_samples", "batch_size")}
    return {
        "sampler": s.name,
        "nfe": s.evaluations(),
        **options,
        "variance": model.variance,
        "precision": "bf16" if compute.bf16 else "float32",
        "device": compute.device.type,
        "weights_sha256": meta["sha256"],
    }


def configured_samples(
    config: Config,
    model: DiffusionModel,
    meta: dict[str, Any],
    count: int,
    compute: Compute,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Samples 0 to count - 1 of the sampler group in batches, uint8 [B, C, H, W], kept by all that decides them.

    `watch`, as in draw_samples, sees nothing of what is kept already.
    """
    decides = {
        "steps": config.sampler.steps,
        "diffusion": meta["config"]["diffusion"],
        "code": code_hash("inference.samples", "build"),
    }
    decides |= sampling_facts(config, model, meta, compute)
    folder = state_root() / "runs" / "samples" / fingerprint(decides)

    def draw(indices: range) -> Tensor:
        return draw_configured(config, model, meta, indices, compute, watch)

    return kept_samples(folder, count, config.sampler.batch_size * world_size(), draw)


def draw_configured(
    config: Config,
    model: DiffusionModel,
    meta: dict[str, Any],
    indices: range,
    compute: Compute,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples number `indices` of the sampler group, uint8 [N, C, H, W]; `watch` as in draw_samples."""
    label = None if config.sampler.label is None else meta["classes"].index(config.sampler.label)
    return draw_samples(model, config.sampler, indices, meta["image_shape"], compute, label, watch)


def save_samples(path: Path, images: Tensor, config: Config, model: DiffusionModel, meta: dict[str, Any]) -> None:
    """Writes the samples as one captioned picture, with a row for each class of a class-conditional model."""
    classes = meta["classes"] if model.num_classes and config.sampler.label is None else []
    save_picture(path, in_rows(images, len(classes)), caption(config, meta), rows=classes[: len(images)])


def caption(config: Config, meta: dict[str, Any]) -> str:
    """What samples are of: the experiment, or else the model; its steps; the sampler and its seed."""
    recipe = meta["config"]
    parts = [os.environ.get("DVC_EXP_NAME") or " ".join(recipe[k]["name"] for k in ("data", "model") if k in recipe)]
    if "trainer" in recipe:  # a foreign model does not say how it was trained
        parts.append(f"{meta['steps']:,} steps of {recipe['trainer']['batch_size']} images")
    return ", ".join([*parts, config.sampler.caption()])


def run(config: Config, out: Path) -> None:
    """Writes samples/00000.png and so on, and samples.png, under `out`."""
    compute = choose_compute(config.device, config.precision, config.deterministic, config.threads)
    model, meta, _ = load_for(config, out)
    config = as_recipe(config, meta)
    check_sampling(config, model, meta)
    model = place_trained(model, config.sampler, compute)
    folder = out / "samples"
    if is_first():
        make_writable(folder)
    images = torch.cat([*configured_samples(config, model, meta, config.sampler.num_samples, compute)])
    if not is_first():
        return
    with replacing_folder(folder, owned="[0-9]*.png") as partial:
        for k, image in enumerate(images):
            poll()
            (partial / f"{k:05}.png").write_bytes(png_bytes(image.permute(1, 2, 0)))
    save_samples(out / "samples.png", images, config, model, meta)
    log.info("%d samples: %s, grid: %s", len(images), folder, out / "samples.png")
