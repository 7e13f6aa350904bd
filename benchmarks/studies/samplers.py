"""Compares the samplers on a trained model: `python -m benchmarks.studies.samplers out_dir=.`

For each sampler and number of steps (--steps: the same for all), with --images images from the same noise: the
evaluations of the network (NFE), the seconds, and two distances that need no download.

- to the solution of the ODE: the root mean square difference of the pixels, in levels of 0 to 255, from DDIM with as
  many steps as the model has. DDPM draws noise on its way and has no such solution.
- to the data: the energy distance (Szekely and Rizzo 2013), unbiased, between the samples and the test images, each
  averaged to 8 x 8 pixels in [-1, 1]; `data` is as many training images in the samples' place.
"""

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.command import figure, run_study
from benchmarks.machine import describe
from benchmarks.project import RESULTS, compute_of, configure
from modeling.data.prepared import ensure_prepared
from modeling.inference.images import to_model
from modeling.inference.samples import draw_samples
from modeling.reliability.terminal import counted
from modeling.stages.sample import load_for

STEPS = {"ddim": (10, 20, 50, 100), "dpm_solver": (5, 10, 20), "ddpm": (50, 250, 1000)}
FIRST = 1_000_000  # number of the first sample: none of them is one that the reports show
TEST_IMAGES = 2000


def features(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float64 [N, C * 64]: averages over a grid of 8 x 8."""
    return adaptive_avg_pool2d(to_model(images), 8).flatten(1).double()


def energy_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """2 E|a - b| - E|a - a'| - E|b - b'| without bias, and its standard error over the rows of `a`.

    Args:
        a: float64 [N, D], N > 1.
        b: float64 [M, D], M > 1: taken as known, its own error is left out.
    """
    n, m = len(a), len(b)
    across = torch.cdist(a, b).mean(1)
    within = torch.cdist(a, a).sum(1) / (n - 1)
    # A row of `a` counts once in `across` and twice in `within`: the derivative of the distance by that row.
    influence = 2 * across - 2 * within
    distance = (2 * across - within).mean() - torch.cdist(b, b).sum() / (m * (m - 1))
    return distance.item(), (influence.std() / math.sqrt(n)).item()


def compare(overrides: list[str], images: int, steps: int) -> dict[str, Any]:
    """Runs every sampler."""
    config = configure(*overrides)
    compute = compute_of(config)
    model, meta, data_config = load_for(config, Path(config.out_dir or "."))
    data = ensure_prepared(config, data_config)
    model = compute.place_model(model)
    shape = data.test.images.shape[1:]
    test = features(data.test.first(TEST_IMAGES).images)

    def draw(name: str, steps: int) -> Tensor:
        sampler = configure(f"sampler={name}", f"sampler.steps={steps}").sampler
        return draw_samples(model, sampler, range(FIRST, FIRST + images), shape, compute)

    draw("ddim", 1)  # warm
    solution = draw("ddim", model.schedule.num_timesteps)
    rows: list[dict[str, Any]] = []
    settings = [(name, nfe) for name, usual in STEPS.items() for nfe in ([steps] if steps else usual)]
    for name, nfe in counted("measuring", settings, "samplers"):
        start = time.perf_counter()
        found = draw(name, nfe)
        row = {"sampler": name, "nfe": nfe, "seconds": time.perf_counter() - start}
        row["distance"], row["stderr"] = energy_distance(features(found), test)
        if name != "ddpm":
            row["rms_to_solution"] = (found.double() - solution.double()).square().mean().sqrt().item()
        logging.info("%s", row)
        rows.append(row)
    distance, error = energy_distance(features(data.train.first(images).images), test)
    about = {"images": images, "seed": 0, "weights_sha256": meta["sha256"]}
    return about | {"rows": rows, "data": {"distance": distance, "stderr": error}, "machine": describe(compute.device)}


def plot(found: dict[str, Any], path: Path) -> None:
    """Both distances against NFE."""
    with figure(path, 10, 4, columns=2) as (left, right):
        for k, name in enumerate(dict.fromkeys(row["sampler"] for row in found["rows"])):
            rows = [row for row in found["rows"] if row["sampler"] == name]
            nfe, style = [row["nfe"] for row in rows], {"marker": "o", "color": f"C{k}", "label": name}
            left.errorbar(nfe, [row["distance"] for row in rows], [row["stderr"] for row in rows], capsize=3, **style)
            if name != "ddpm":
                right.plot(nfe, [row["rms_to_solution"] for row in rows], **style)
        left.axhline(found["data"]["distance"], color="grey", linestyle="--", label="training images")
        left.set(ylabel="energy distance to the test images", title=f"{found['images']} images, one standard error")
        right.set(
            ylabel="RMS difference, levels of 255", yscale="log", title="from the ODE's solution (DDIM, all steps)"
        )
        for axes in (left, right):
            axes.set(xscale="log", xlabel="evaluations of the network (NFE)")
            axes.grid(alpha=0.3)
            axes.legend()


main = partial(run_study, compare, plot, out=RESULTS / "samplers", images=128, steps=0)

if __name__ == "__main__":
    main()
