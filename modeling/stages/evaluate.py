"""Stage `evaluate`: the metrics and the sample grid of a trained model, into reports/ and into its own W&B run."""

import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.checkpoint import code_hash
from modeling.data import LabelledImages, load_split, read_prepared
from modeling.device import Compute, choose_compute
from modeling.diffusion import DiffusionModel
from modeling.distributed import is_first
from modeling.drawing import sample_grid
from modeling.errors import ConfigError, UserError
from modeling.evaluation import bits_per_dim, held_out_report
from modeling.files import make_writable, write_atomic
from modeling.images import save_png
from modeling.nearest import nearest_images, panel
from modeling.paths import read_notes, state_root
from modeling.quality import (
    Inception,
    Unavailable,
    kept_samples,
    load_inception,
    quality_metrics,
    reference_features,
)
from modeling.settings import Config
from modeling.stages.prepare import ensure_prepared
from modeling.stages.sample import asked_samples, check_asked, place_trained, trained_model
from modeling.tracking import Tracker

log = logging.getLogger(__name__)
CPU_BPD = (1000, 20)  # test images and time steps of bits/dim on a CPU, if the configuration leaves it open
NEAREST = (10, 7)  # samples in the panel, and neighbours of each


def run(config: Config, out: Path) -> None:
    """Writes reports/evaluate.json, reports/samples.png and reports/nearest.png under `out`.

    Raises:
        UserError: bad model file, data that does not fit it, or an output that cannot be written.
    """
    compute = choose_compute(config.device, config.precision, config.deterministic)
    model, meta, data = trained_model(config, out)
    check_asked(model, meta, config)
    source = ensure_prepared(config, data)
    prepared = read_prepared(source)
    if prepared["shape"] != meta["image_shape"]:
        raise ConfigError(
            f"data={data.name}: its images are {prepared['shape']}, those of the model {meta['image_shape']}"
        )
    target = out / "reports"
    if is_first():
        make_writable(target)
    model = place_trained(model, config.sampler, compute)
    train, test = load_split(source, "train"), load_split(source, "test")
    inception = _inception(config, compute)
    report = _likelihood(config, model, test, compute) | {"made_on": compute.describe()}
    images = asked_samples(model, meta, config, range(config.sampler.num_samples), compute)
    report["quality"] = (
        {"left_out": inception}
        if isinstance(inception, str)
        else _quality(inception, config, model, meta, prepared, train.images, compute)
    )
    if not is_first():
        return
    grid = sample_grid(images, model.num_classes)
    save_png(target / "samples.png", grid)
    near, nearest = _nearest(images, train, test, meta)
    save_png(target / "nearest.png", nearest)
    report |= near
    write_atomic(target / "evaluate.json", (json.dumps({"evaluate": report}, indent=2) + "\n").encode())
    folder = state_root() / "runs" / meta["run"]
    used = {key: dataclasses.asdict(getattr(config, key)) for key in ("sampler", "evaluation")}
    told = {key: value for key, value in meta["config"].items() if key != "trainer"}  # training has told all of it
    tracker = Tracker(config.wandb, told | used, read_notes(folder)["wandb_id"], None, state_root())
    step = max(meta["steps"] + 1, tracker.first)  # W&B drops what comes at a step that it has
    tracker.log(dict(_numbers("evaluate", report)), step)
    tracker.image("evaluate/samples", grid, step)
    tracker.image("evaluate/nearest", nearest, step)
    tracker.finish()
    log.info("metrics and samples: %s", target)


def _likelihood(config: Config, model: DiffusionModel, test: LabelledImages, compute: Compute) -> dict[str, Any]:
    e = config.evaluation
    report = held_out_report(model, test, e.batch_size, compute)
    if not math.isfinite(report["loss"]):
        raise UserError(f"the held-out loss is {report['loss']}: the model diverged, or its weights are of no use")
    log.info("held-out loss %.5f over %d images", report["loss"], report["loss_images"])
    images, timesteps = (None, None) if compute.device.type == "cuda" else CPU_BPD
    images, timesteps = e.bpd_images or images, e.bpd_timesteps or timesteps
    report |= bits_per_dim(model, test.first(images), e.batch_size, timesteps, compute)
    log.info("%.3f +- %.3f bits/dim", report["bits_per_dim"], report["bits_per_dim_stderr"])
    return report


def _nearest(
    images: Tensor, train: LabelledImages, test: LabelledImages, meta: dict[str, Any]
) -> tuple[dict[str, float], Tensor]:
    """How near samples are to training images, beside how near as many test images are; and the panel."""
    count, k = NEAREST
    mirror = bool(meta["config"].get("trainer", {}).get("random_flip", False))
    k = min(k, len(train.images))
    found = nearest_images(images, train.images, k, mirror)
    held_out = nearest_images(test.images[: len(images)], train.images, 1, mirror)
    distances = {
        "nearest_rms": found.rms[:, 0].mean().item(),
        "nearest_rms_of_test_images": held_out.rms[:, 0].mean().item(),
    }
    return distances, panel(images[:count], found.first(count))


def _inception(config: Config, compute: Compute) -> Inception | str:
    """The feature extractor of FID and its relatives, or why they are left out."""
    e = config.evaluation
    if e.fid_samples is None:
        return "evaluation.fid_samples=null"
    try:
        weights = None if e.inception_weights is None else Path(e.inception_weights)
        return load_inception(weights, e.inception_sha256, compute.device)
    except Unavailable as reason:
        log.warning("FID and its relatives are left out: %s", reason)
        return str(reason)


def _quality(
    inception: Inception,
    config: Config,
    model: DiffusionModel,
    meta: dict[str, Any],
    prepared: dict[str, Any],
    train: Tensor,
    compute: Compute,
) -> dict[str, Any]:
    """FID and its relatives with the facts that make them comparable."""
    e, s = config.evaluation, config.sampler
    assert e.fid_samples is not None
    facts = {
        "sampler": s.name,
        "nfe": s.steps if s.guidance_scale == 1 else 2 * s.steps,  # guided: with and without the label
        "eta": getattr(s, "eta", None),
        "guidance_scale": s.guidance_scale,
        "seed": s.seed,
        "label": s.label,
        "clip_denoised": s.clip_denoised,
        "variance": model.variance,
        "precision": "bf16" if compute.bf16 else "float32",
        "compile": s.compile,
        "device": compute.device.type,
        "weights_sha256": meta["sha256"],
    }
    code = [code_hash("drawing"), code_hash("unet")]
    drawn_with = facts | {"steps": s.steps, "diffusion": meta["config"]["diffusion"], "code": code}
    key = hashlib.sha256(json.dumps(drawn_with, sort_keys=True).encode()).hexdigest()[:16]
    root = state_root() / "runs"
    samples = kept_samples(
        root / meta["run"] / "samples-for-fid" / key,
        e.fid_samples,
        e.batch_size,
        lambda indices: asked_samples(model, meta, config, indices, compute),
    )
    pool, logits = inception.features(samples)
    reference = reference_features(inception, train, prepared["sha256"]["train"], root / "reference", e.batch_size)
    metrics = quality_metrics(pool, logits, reference) if is_first() else {}
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    made = {"num_samples": e.fid_samples, "reference": f"{prepared['num_train']} training images, not flipped"}
    return metrics | made | facts | {"inception_sha256": inception.sha256}


def _numbers(prefix: str, report: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a nested report under names like evaluate/quality/fid."""
    found: list[tuple[str, float]] = []
    for key, value in report.items():
        if isinstance(value, dict):
            found += _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", value))
    return found
