"""Stage `evaluate`: the metrics and the sample grid of a trained model, into reports/ and into its own W&B run."""

import json
import logging
from pathlib import Path
from typing import Any

from modeling.data import load_split, read_prepared
from modeling.device import choose_compute
from modeling.drawing import sample_grid
from modeling.errors import ConfigError
from modeling.evaluation import bits_per_dim, held_out_report
from modeling.files import make_writable, write_atomic
from modeling.images import save_png
from modeling.paths import read_notes, state_root
from modeling.settings import Config
from modeling.stages.prepare import ensure_prepared
from modeling.stages.sample import grid_samples, trained_model
from modeling.tracking import Tracker

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> None:
    """Writes reports/evaluate.json and reports/samples.png under `out`.

    Raises:
        UserError: bad model file, data that does not fit it, or an output that cannot be written.
    """
    compute = choose_compute(config.device, config.precision)
    model, meta, data = trained_model(config, out)
    source = ensure_prepared(config, data)
    shape = read_prepared(source)["shape"]
    if shape != meta["image_shape"]:
        raise ConfigError(f"data={data.name}: its images are {shape}, those of the model {meta['image_shape']}")
    target = out / "reports"
    make_writable(target)
    model = compute.place_model(model)
    test = load_split(source, "test")
    e = config.evaluation
    report: dict[str, Any] = held_out_report(model, test, e.batch_size, compute)
    log.info("held-out loss %.5f over %d images", report["loss"], report["loss_images"])
    report |= bits_per_dim(model, test.first(e.bpd_images), e.batch_size, e.bpd_timesteps, compute)
    log.info("%.3f +- %.3f bits/dim", report["bits_per_dim"], report["bits_per_dim_stderr"])
    images = grid_samples(model, meta, config, compute)
    grid = sample_grid(images, model.num_classes)
    save_png(target / "samples.png", grid)
    write_atomic(target / "evaluate.json", (json.dumps({"evaluate": report}, indent=2) + "\n").encode())
    folder = state_root() / "runs" / meta["run"]
    tracker = Tracker(config.wandb, meta["config"], read_notes(folder)["wandb_id"], None, state_root())
    flat = {k: v for k, v in report.items() if not isinstance(v, dict)}
    for key in ("loss_by_t", "bits_per_dim_parts"):
        flat |= {f"{key}/{part}": value for part, value in report[key].items()}
    tracker.log({f"evaluate/{key}": value for key, value in flat.items()}, meta["steps"] + 1)
    tracker.image("evaluate/samples", grid, meta["steps"] + 1)
    tracker.finish()
    log.info("metrics and samples: %s", target)
