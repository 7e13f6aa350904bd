"""Compares the samplers on a trained model: `python -m benchmarks.samplers out_dir=.`

For each sampler and number of steps: the evaluations of the network (NFE), the seconds, and two distances that need no
download. Every sampler starts from the same noise, image by image.

- to the solution of the ODE: the root mean square difference of the pixels, in levels of 0 to 255, from DDIM with as
  many steps as the model has. DDPM draws noise on its way and has no such solution.
- to the data: the energy distance (Szekely and Rizzo 2013), unbiased, between the samples and the test images, each
  averaged to 8 x 8 pixels in [-1, 1]; `data` is as many training images in the samples' place.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.machine import describe
from benchmarks.project import ROOT, command_line, configure
from modeling.data.prepared import LabelledImages, Prepared
from modeling.inference.device import choose_compute
from modeling.inference.images import to_model
from modeling.inference.samples import draw_samples
from modeling.stages.prepare import ensure_prepared
from modeling.stages.sample import load_for

CHOICES = {"ddim": (10, 20, 50, 100), "dpm_solver": (5, 10, 20), "ddpm": (50, 250, 1000)}
SAMPLES_FROM = 1_000_000  # their seeds are of their own: no sample is one that the reports show
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
    terms = 2 * across - within
    # A row of `a` counts once in `across` and twice in `within`, which the derivative of the whole by a row shows.
    influence = 2 * across - 2 * within
    return (terms.mean() - torch.cdist(b, b).sum() / (m * (m - 1))).item(), (influence.std() / math.sqrt(n)).item()


def compare(images: int, overrides: list[str], choices: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Runs every sampler; see the head of this module."""
    config = configure(*overrides)
    compute = choose_compute(config.device, config.precision, config.deterministic)
    model, meta, data = load_for(config, Path(config.out_dir or "."))
    source = ensure_prepared(config, data)
    height, width, channels = meta["image_shape"]
    model = compute.place_model(model)
    test = features(Prepared(source, "test").first(TEST_IMAGES).images)

    def run(name: str, steps: int) -> tuple[Tensor, float]:
        sampler = configure(f"sampler={name}", f"sampler.steps={steps}").sampler
        start = time.perf_counter()
        indices = range(SAMPLES_FROM, SAMPLES_FROM + images)
        found = draw_samples(model, sampler, indices, (channels, height, width), compute)
        return found, time.perf_counter() - start

    run("ddim", 1)  # warm
    solution, _ = run("ddim", model.schedule.num_timesteps)
    rows = []
    for name, counts in choices.items():
        for steps in counts:
            found, seconds = run(name, steps)
            distance, error = energy_distance(features(found), test)
            rms = (found.double() - solution.double()).square().mean().sqrt().item()
            row = {"sampler": name, "nfe": steps, "seconds": seconds, "distance": distance, "stderr": error}
            rows.append(row | ({} if name == "ddpm" else {"rms_to_solution": rms}))
            print(
                " ".join(f"{key} {value:.4g}" if key != "sampler" else value for key, value in rows[-1].items()),
                flush=True,
            )
    train: LabelledImages = Prepared(source, "train")
    distance, error = energy_distance(features(train.first(images).images), test)
    about = {"images": images, "seed": 0, "weights_sha256": meta["sha256"], "run": meta.get("run")}
    return about | {"rows": rows, "data": {"distance": distance, "stderr": error}, "machine": describe(compute.device)}


def plot(found: dict[str, Any], path: Path) -> None:
    """Both distances against NFE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, name in enumerate(dict.fromkeys(row["sampler"] for row in found["rows"])):
        rows = [row for row in found["rows"] if row["sampler"] == name]
        nfe, style = [row["nfe"] for row in rows], {"marker": "o", "color": f"C{k}", "label": name}
        left.errorbar(nfe, [row["distance"] for row in rows], [row["stderr"] for row in rows], capsize=3, **style)
        if name != "ddpm":
            right.plot(nfe, [row["rms_to_solution"] for row in rows], **style)
    left.axhline(found["data"]["distance"], color="grey", linestyle="--", label="training images")
    left.set(ylabel="energy distance to the test images", title=f"{found['images']} images, one standard error")
    right.set(ylabel="RMS difference, levels of 255", yscale="log", title="from the ODE's solution (DDIM, all steps)")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="evaluations of the network (NFE)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="for each sampler")
    parser.add_argument("--steps", type=int, help="of every sampler, instead of the usual numbers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "samplers", help="without ending")
    parser.add_argument("overrides", nargs="*", help="of the configuration: out_dir=. or model.weights=<file>")
    arguments = parser.parse_args()
    choices = {name: (arguments.steps,) for name in CHOICES} if arguments.steps else CHOICES
    found = compare(arguments.images, arguments.overrides, choices)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    plot(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    command_line(main)
