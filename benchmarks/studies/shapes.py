"""How near samples are to whole shapes: `python -m benchmarks.studies.shapes out_dir=.`

For each sample of the model of out_dir, drawn as its recipe draws, the nearest shape of its class: place, size, colour
and background by least squares. What is left is its error: root mean square over the image, in levels of 255. The
data's own images have less than 0.3, from their rounding. A classifier takes a frame with a gap for a frame; this sees
the gap. An image of one colour fits any shape and is counted apart, as missing. By class the mean error, the largest,
the share of --samples above --limit levels, and the share that is missing.
"""

import math
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.project import RESULTS, compute_of, configure
from modeling.data.shapes import CLASSES, RADII, coverage
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import UserError
from modeling.reliability.terminal import counted
from modeling.stages.sample import as_recipe, load_for

Array = npt.NDArray[np.float64]
FAINT = 10.0  # levels: half of the least root mean square difference of an image of the data from its mean colour


def left_over(pixels: Array, covered: Array) -> Array:
    """Root mean squares, [M], of pixels [P, C] less the best mixture of two colours by each coverage [M, P]."""
    pixels = pixels - pixels.mean(0)
    covered = covered - covered.mean(1, keepdims=True)
    variance = np.maximum((covered**2).sum(1, keepdims=True), 1e-9)  # a shape outside the image explains nothing
    explained = (covered @ pixels) ** 2 / variance
    return np.sqrt(np.maximum((pixels**2).sum() - explained.sum(1), 0) / pixels.size)


def nearest(image: npt.NDArray[np.uint8], name: str) -> float:
    """The root mean square, in levels, by which an image [H, W, C] differs from the nearest shape of a class."""
    size = len(image)
    pixels = image.reshape(size * size, -1).astype(np.float64)

    def errors(places: Array) -> Array:
        return left_over(pixels, np.stack([coverage(name, size, *place).ravel() for place in places]))

    step = np.array([0.01, 0.02, 0.02]) * size
    inside = np.arange(size * RADII[0], size - size * RADII[0], step[1])
    places = np.array(list(product(np.arange(size * RADII[0], size * RADII[1], 2 * step[0]), inside, inside)))
    place = places[errors(places).argmin()]
    around = np.array(list(product((0, -1, 1), repeat=3)))  # itself first, so that it wins if all are equal
    while step[0] > 1e-4 * size:
        places = place + around * step
        best = errors(places).argmin()
        place, step = places[best], step / 2 if best == 0 else step
    return float(errors(place[None])[0])


def is_missing(image: npt.NDArray[np.uint8]) -> bool:
    """Whether an image [H, W, C] shows no shape."""
    return bool(np.sqrt(image.var((0, 1)).mean()) < FAINT)


def measure(overrides: list[str], samples: int, limit: float) -> dict[str, Any]:
    """The errors by class, and of all."""
    config = configure(*overrides)
    compute = compute_of(config)
    model, meta, _ = load_for(config, Path(config.out_dir or "."))
    if not model.num_classes or tuple(meta["classes"]) != CLASSES:
        raise UserError("the model has not learned the classes of data=shapes: it must be of experiment=demo, or such")
    sampler = as_recipe(config, meta).sampler
    images = draw_samples(compute.place_model(model), sampler, range(samples), meta["image_shape"], compute)
    found: dict[str, list[float]] = {name: [] for name in CLASSES}  # the errors; not a number where none can be
    for k in counted("measuring", range(samples), "samples"):
        name, image = CLASSES[k % len(CLASSES)], images[k].permute(1, 2, 0).numpy()
        found[name].append(math.nan if is_missing(image) else nearest(image, name))
    groups = {**found, "all": [value for values in found.values() for value in values]}
    rows = {name: summary(values, limit) for name, values in groups.items() if values}
    return {"limit": limit, "errors": rows, "machine": describe(torch.device("cpu"))}


def summary(values: list[float], limit: float) -> dict[str, float]:
    """Mean and largest of the errors, and the shares of all that are above a limit and that are missing."""
    errors = np.array([value for value in values if not math.isnan(value)])
    mean, largest = (errors.mean().item(), errors.max().item()) if len(errors) else (math.nan, math.nan)
    shares = {"above": (errors > limit).sum().item() / len(values), "missing": 1 - len(errors) / len(values)}
    return {"mean": mean, "largest": largest, **shares}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [f"| class | mean error | largest | above {found['limit']:g} levels | missing |", "|---|---|---|---|---|"]
    for name, row in found["errors"].items():
        shares = f"{row['above']:.1%} | {row['missing']:.1%}"
        lines.append(f"| {name} | {row['mean']:.1f} | {row['largest']:.1f} | {shares} |")
    return "\n".join(lines)


main = partial(run_study, measure, text=table, out=RESULTS / "shapes", samples=200, limit=20.0)

if __name__ == "__main__":
    main()
