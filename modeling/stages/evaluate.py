"""Stage `evaluate`: the metrics and the sample grid of a trained model, into reports/ and W&B."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.data.prepared import LabelledImages, Prepared, ensure_prepared
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import from_first, is_first, world_size
from modeling.evaluation import fid
from modeling.evaluation.bits_per_dim import bits_per_dim, held_out_report, standard_error
from modeling.evaluation.distance import packet_sums, wavelet_distance
from modeling.evaluation.fid import Inception
from modeling.evaluation.nearest import Neighbours, nearest_images
from modeling.evaluation.recognition import kept_classifier, recognised
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import sample_grid, save_png
from modeling.inference.samples import DenoisingStrip
from modeling.reliability.errors import ConfigError, UserError
from modeling.reliability.files import make_writable, state_root, write_json
from modeling.reporting.experiments import evaluated_with, log_evaluation
from modeling.reporting.pictures import save_picture
from modeling.settings.groups import Config
from modeling.stages.sample import (
    as_recipe,
    caption,
    check_sampling,
    configured_samples,
    draw_configured,
    load_for,
    place_trained,
    sampling_facts,
    save_samples,
)

log = logging.getLogger(__name__)
CPU_BPD = (1000, 20)  # test images and time steps of bits/dim on a CPU, if the configuration leaves it open
NEAREST = (10, 7)  # samples in the panel, and neighbours of each
STRIP = (8, 9)  # samples in the denoising strip, and time steps of each


def run(config: Config, out: Path) -> None:
    """Writes metrics, details and pictures into reports/ under `out`, else raises UserError."""
    compute = choose_compute(config.device, config.precision, config.deterministic, config.threads)
    model, meta, data_config = load_for(config, out)
    config = as_recipe(config, meta)
    check_sampling(config, model, meta)
    data = ensure_prepared(config, data_config)
    _check_data(data, data_config.name, model, meta)
    target = out / "reports"
    if is_first():
        make_writable(target)
    model = place_trained(model, config.sampler, compute)
    inception = _inception(config, compute)
    report = _likelihood(config, model, data.test, compute) | {"made_on": compute.describe()}
    shown, frames = STRIP
    shown = min(shown, config.sampler.num_samples)
    strip = DenoisingStrip(model.schedule.table(), config.sampler, shown, frames)
    count = max(config.sampler.num_samples, config.evaluation.num_samples)
    drawn = torch.cat([*configured_samples(config, model, meta, count, compute, strip)])
    images = drawn[: config.sampler.num_samples]
    wanted = min(strip.count, config.sampler.batch_size)
    if not from_first(lambda: strip.rows() >= wanted):  # samples are kept, or the first of several processes drew few
        # As many in each process: the strip watches the share of the first one.
        draw_configured(config, model, meta, range(strip.count * world_size()), compute, strip)
    if isinstance(inception, str):
        report["quality"] = {"left_out": inception}
    else:
        report["quality"] = _quality(config, inception, model, meta, data, compute)
    if not is_first():
        return
    report |= _beside_data(config, model, meta, drawn[: config.evaluation.num_samples], data, compute)
    found, held_out = _nearest(images, data, meta)
    report |= {"nearest_rms": found.rms[:, 0].mean().item(), "nearest_rms_of_test_images": held_out.rms.mean().item()}
    _save_pictures(target, images, found, strip, config, model, meta)
    _mention_nan(report, f"too few images, {len(data.train.images)} to train and {len(data.test.images)} to test")
    made = {"weights_sha256": meta["sha256"], "data_sha256": data.sha256, "variance": model.variance}
    made["made_with"] = evaluated_with(config)  # which W&B has in its configuration
    write_json(target / "evaluate-details.json", report | made)
    write_json(target / "evaluate.json", _metrics(report))
    log_evaluation(config, meta, report, target)
    log.info("metrics and samples: %s", target)


def _check_data(data: Prepared, name: str, model: DiffusionModel, meta: dict[str, Any]) -> None:
    """ConfigError unless a model can be measured on data; logs if it was not trained on them."""
    if data.shape != meta["image_shape"]:
        raise ConfigError(f"data={name}: its images are {data.shape}, those of the model {meta['image_shape']}")
    known = meta["classes"] if model.num_classes else data.classes
    if data.classes != known:
        first = next((f": {a} in place of {b}" for a, b in zip(data.classes, known, strict=False) if a != b), "")
        learned = f"the {len(known)} that the model has learned"
        raise ConfigError(f"data={name}: its {len(data.classes)} classes are not {learned}{first}")
    trained_on = meta.get("data_sha256")  # not of a file from before there was one
    if isinstance(trained_on, dict) and trained_on.get("train") != data.sha256["train"]:
        others = "some of which may be among the test images"
        log.warning("data=%s: not the images that the model was trained on, %s", name, others)


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


def _beside_data(
    config: Config, model: DiffusionModel, meta: dict[str, Any], images: Tensor, data: Prepared, compute: Compute
) -> dict[str, Any]:
    """How far the samples are from the training images and, with classes, how many are recognised.

    Beside each number the same of test images, which no model can be expected to beat; but where they are fewer than
    the samples their wavelet distance is larger for that alone, so the report has their number too.
    """
    train, test = data.train, data.test.first(len(images))
    reference = packet_sums(train.images).normal()
    distance, error = wavelet_distance(images, reference)
    floor, _ = wavelet_distance(test.images, reference)
    report: dict[str, Any] = {"wavelet_distance": distance, "wavelet_distance_stderr": error}
    report |= {"wavelet_distance_samples": len(images)}
    report |= {"wavelet_distance_of_test_images": floor, "wavelet_distance_test_images": len(test.images)}
    log.info("wavelet distance %.4g +- %.2g, of %d test images %.4g", distance, error, len(test.images), floor)
    if not model.num_classes:
        return report
    folder, classes = state_root() / "runs" / "reference", len(meta["classes"])
    network = kept_classifier(train, data.sha256["train"], classes, _mirrors(meta), compute, folder)
    labels = torch.arange(len(images)) % classes
    if config.sampler.label is not None:
        labels = torch.full_like(labels, meta["classes"].index(config.sampler.label))
    right = recognised(network, images, labels, compute)
    report["recognised"] = right.mean().item()
    report["recognised_stderr"] = standard_error(right)
    report["recognised_by_class"] = {
        name: right[labels == k].mean().item() for k, name in enumerate(meta["classes"]) if bool((labels == k).any())
    }
    report["recognised_of_test_images"] = recognised(network, *data.test, compute).mean().item()
    of = report["recognised"], report["recognised_stderr"], report["recognised_of_test_images"]
    log.info("%.1f +- %.1f %% recognised, of test images %.1f %%", *(100 * share for share in of))
    return report


def _mirrors(meta: dict[str, Any]) -> bool:
    """Whether the model was trained on mirror images too."""
    return bool(meta["config"].get("trainer", {}).get("random_flip", False))


def _nearest(images: Tensor, data: Prepared, meta: dict[str, Any]) -> tuple[Neighbours, Neighbours]:
    """The training images nearest to samples, and the one nearest to each of as many test images."""
    train = data.train.images
    mirror = _mirrors(meta)
    found = nearest_images(images, train, min(NEAREST[1], len(train)), mirror)
    return found, nearest_images(data.test.images[: len(images)], train, 1, mirror)


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    """What tells which model is best; DVC makes a column of each."""
    quality = report["quality"]
    names = {"loss": "held_out_loss", "bits_per_dim": "bits_per_dim", "bits_per_dim_stderr": "bits_per_dim_stderr"}
    fids = {key: value for key, value in quality.items() if key.startswith("fid")}
    names |= {key: key for key in ("wavelet_distance", "wavelet_distance_stderr", "recognised") if key in report}
    return {name: report[key] for key, name in names.items()} | fids


def _mention_nan(report: dict[str, Any], why: str) -> None:
    """Notes under `null` which numbers of the report are none, and why: the files have null for them."""
    numbers = [*report.items(), *report["quality"].items()]
    names = [name for name, value in numbers if isinstance(value, float) and not math.isfinite(value)]
    if names:
        report["null"] = f"{', '.join(names)}: {why}"
        log.warning("null in %s", report["null"])


def _save_pictures(
    target: Path,
    images: Tensor,
    found: Neighbours,
    strip: DenoisingStrip,
    config: Config,
    model: DiffusionModel,
    meta: dict[str, Any],
) -> None:
    about = caption(config, meta)
    save_samples(target / "samples.png", images, config, model, meta)
    save_png(target / "samples-plain.png", sample_grid(images, model.num_classes))
    count = min(NEAREST[0], len(images))
    rows = [[images[k], *found.images[k]] for k in range(count)]
    distances = [["", *(f"{rms:.1f}" for rms in found.rms[k].tolist())] for k in range(count)]
    columns = ["sample", *(f"nearest {k + 1}" for k in range(found.rms.shape[1]))]
    text = "Each sample and the nearest training images; below, the root mean square difference in levels of 255. "
    save_picture(target / "nearest.png", rows, text + about, columns=columns, below=distances)
    steps = sorted(strip.frames, reverse=True)
    # Of the first batch, which may be smaller than `count`.
    rows = [[*column, images[k]] for k, column in enumerate(zip(*(strip.frames[t] for t in steps), strict=True))]
    text = "From noise to samples: x_t at time steps t, and x_0. "
    save_picture(target / "denoising.png", rows, text + about, columns=[*(f"t = {t}" for t in steps), "x_0"])


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
    e = config.evaluation
    assert e.fid_samples is not None
    root = state_root() / "runs"
    samples = configured_samples(config, model, meta, e.fid_samples, compute)
    pool, logits = inception.features(samples)
    train = data.train.images
    reference = fid.reference_features(inception, train, data.sha256["train"], root / "reference", e.batch_size)
    metrics = fid.quality_metrics(pool, logits, reference) if is_first() else {}
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    made = {"num_samples": e.fid_samples, "reference": f"{len(train)} training images, not flipped"}
    if not fid.enough_neighbours(e.fid_samples, len(train)):
        made["without"] = f"precision and recall, which look for {fid.NEIGHBOURS} neighbours of each image"
        log.warning("without %s: there are %d training images", made["without"], len(train))
    return metrics | made | sampling_facts(config, model, meta, compute) | {"inception_sha256": inception.sha256}
