"""Stage `evaluate`: the metrics and the sample grid of a trained model, into reports/ and W&B."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.checkpoints.fingerprint import code_hash, fingerprint
from modeling.data.prepared import LabelledImages, Prepared, ensure_prepared
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import is_first
from modeling.evaluation import fid
from modeling.evaluation.bits_per_dim import bits_per_dim, held_out_report
from modeling.evaluation.fid import Inception
from modeling.evaluation.nearest import nearest_images, panel
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import sample_grid, save_png
from modeling.reliability.errors import ConfigError, UserError
from modeling.reliability.files import make_writable, state_root, write_atomic
from modeling.reporting.experiments import log_evaluation
from modeling.settings import Config
from modeling.stages.sample import check_sampling, configured_samples, load_for, place_trained

log = logging.getLogger(__name__)
CPU_BPD = (1000, 20)  # test images and time steps of bits/dim on a CPU, if the configuration leaves it open
NEAREST = (10, 7)  # samples in the panel, and neighbours of each


def run(config: Config, out: Path) -> None:
    """Writes reports/evaluate.json, reports/samples.png and reports/nearest.png under `out`, else raises UserError."""
    compute = choose_compute(config.device, config.precision, config.deterministic)
    model, meta, data_config = load_for(config, out)
    check_sampling(config, model, meta)
    data = ensure_prepared(config, data_config)
    if data.shape != meta["image_shape"]:
        sizes = f"its images are {data.shape}, those of the model {meta['image_shape']}"
        raise ConfigError(f"data={data_config.name}: {sizes}")
    target = out / "reports"
    if is_first():
        make_writable(target)
    model = place_trained(model, config.sampler, compute)
    inception = _inception(config, compute)
    report = _likelihood(config, model, data.test, compute) | {"made_on": compute.describe()}
    images = configured_samples(config, model, meta, range(config.sampler.num_samples), compute)
    if isinstance(inception, str):
        report["quality"] = {"left_out": inception}
    else:
        report["quality"] = _quality(config, inception, model, meta, data, compute)
    if not is_first():
        return
    distances, neighbours = _nearest(images, data, meta)
    report |= distances
    save_png(target / "samples.png", sample_grid(images, model.num_classes))
    save_png(target / "nearest.png", neighbours)
    write_atomic(target / "evaluate.json", (json.dumps({"evaluate": report}, indent=2) + "\n").encode())
    log_evaluation(config, meta, report, target)
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


def _nearest(images: Tensor, data: Prepared, meta: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """The distance of samples to training images, beside that of as many test images; and the panel."""
    count, k = NEAREST
    mirror = bool(meta["config"].get("trainer", {}).get("random_flip", False))
    train = data.train.images
    found = nearest_images(images, train, min(k, len(train)), mirror)
    held_out = nearest_images(data.test.images[: len(images)], train, 1, mirror)
    distances = {"nearest_rms": found.rms, "nearest_rms_of_test_images": held_out.rms}
    means = {name: rms[:, 0].mean().item() for name, rms in distances.items()}
    return means, panel(images[:count], found.images[:count])


def _inception(config: Config, compute: Compute) -> Inception | str:
    """The feature extractor of FID and its relatives, or why they are left out."""
    e = config.evaluation
    if e.fid_samples is None:
        return "evaluation.fid_samples=null"
    try:
        return fid.load_inception(e.inception_weights, e.inception_sha256, compute.device)
    except fid.Unavailable as reason:
        log.warning("FID and its relatives are left out: %s", reason)
        return str(reason)


def _quality(
    config: Config, inception: Inception, model: DiffusionModel, meta: dict[str, Any], data: Prepared, compute: Compute
) -> dict[str, Any]:
    """FID and its relatives with the facts that make them comparable."""
    e, s = config.evaluation, config.sampler
    assert e.fid_samples is not None
    options = {k: v for k, v in vars(s).items() if k not in ("name", "steps", "num_samples", "batch_size")}
    facts = {
        "sampler": s.name,
        "nfe": s.steps if s.guidance_scale == 1 else 2 * s.steps,  # guided: with and without the label
        **options,
        "variance": model.variance,
        "precision": "bf16" if compute.bf16 else "float32",
        "device": compute.device.type,
        "weights_sha256": meta["sha256"],
    }
    code = code_hash("inference.samples", "build")
    drawn_with = facts | {"steps": s.steps, "diffusion": meta["config"]["diffusion"], "code": code}
    root = state_root() / "runs"
    folder = root / "samples-for-fid" / fingerprint(drawn_with)

    def draw(indices: range) -> Tensor:
        return configured_samples(config, model, meta, indices, compute)

    samples = fid.kept_samples(folder, e.fid_samples, e.batch_size, draw)
    pool, logits = inception.features(samples)
    train = data.train.images
    reference = fid.reference_features(inception, train, data.sha256["train"], root / "reference", e.batch_size)
    metrics = fid.quality_metrics(pool, logits, reference) if is_first() else {}
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    made = {"num_samples": e.fid_samples, "reference": f"{len(train)} training images, not flipped"}
    return metrics | made | facts | {"inception_sha256": inception.sha256}
