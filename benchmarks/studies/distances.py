"""What distances between samples and data see: `python -m benchmarks.studies.distances out_dir=. data=cifar10`

Test images that are spoilt in ways that people see, and samples of the model of out_dir with few and many steps, with
and without guidance. --models takes more files, separated by commas, such as one of an early checkpoint. A column each:
the distance of `evaluate`; the same of the packets themselves, as published; and the energy distance of the images at
8 x 8 pixels. All are of --samples images against the training images, as multiples of what as many test images have.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
from torch import Tensor

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.project import RESULTS, compute_of, configure
from modeling.data.prepared import LabelledImages, ensure_prepared
from modeling.evaluation.distance import Normal, frechet_distances, packet_sums, wavelet_distance, wavelet_packets
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import UserError
from modeling.stages.sample import as_recipe, load_for

MANY = 20_000  # training images for the columns that are only compared with


def spoilt(test: LabelledImages, count: int) -> Iterator[tuple[str, Tensor]]:
    """`count` test images and what becomes of them, uint8 [N, C, H, W]."""
    images, labels = test.first(count)
    generator = torch.Generator().manual_seed(0)
    x = images.float()
    n, c, height, width = x.shape
    noise = torch.randn(x.shape, generator=generator)
    cast = torch.randn(n, c, 1, 1, generator=generator)
    yield "test images", x
    for levels in (20, 40):
        yield f"colour casts of {levels} levels", x + levels * cast
    grey = x.mean(1, keepdim=True)
    yield "colours 1.8 times as strong", grey + 1.8 * (x - grey)
    for sigma in (0.7, 1.2):
        yield f"blur of {sigma} pixels", V.gaussian_blur(x, 7, sigma)
    for levels in (5, 15):
        yield f"noise of {levels} levels", x + levels * noise
    for kept in (10, 100):
        yield f"copies of {kept} images", x[:kept].repeat(math.ceil(n / kept), 1, 1, 1)[:n]
    yield "one class only", test.images[test.labels == labels.mode().values][:n].float()
    flat = test.images.flatten(1).double()
    drawn = torch.randn(n, len(flat), generator=generator, dtype=torch.float64) @ (flat - flat.mean(0))
    yield "noise with the covariance of the images", (flat.mean(0) + drawn / math.sqrt(len(flat))).view_as(x)
    tiles = x.unfold(2, height // 4, height // 4).unfold(3, width // 4, width // 4).flatten(2, 3)  # [N, C, 16, h, w]
    mixed = torch.stack([each[:, torch.randperm(16, generator=generator)] for each in tiles])
    columns = mixed.permute(0, 1, 3, 4, 2).reshape(n, -1, 16)
    yield "their sixteenths in another order", F.fold(columns, (height, width), height // 4, stride=height // 4)


def drawn(overrides: list[str], samples: int) -> Iterator[tuple[str, Tensor]]:
    """Samples of a model as its recipe draws them, with few steps, and without guidance."""
    config = configure(*overrides)
    compute = compute_of(config)
    model, meta, _ = load_for(config, Path(config.out_dir or "."))
    sampler = as_recipe(config, meta).sampler
    model = compute.place_model(model)
    ways = [sampler, replace(sampler, steps=5)]
    if (unguided := replace(sampler, guidance_scale=1.0, autoguidance_scale=1.0)) != sampler:
        ways.append(unguided)
    for way in ways:
        yield (
            f"{meta['steps']:,} steps: {way.caption()}",
            draw_samples(model, way, range(samples), meta["image_shape"], compute),
        )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Of uint8 [N, C, H, W] and [M, C, H, W] at 8 x 8 pixels (Szekely and Rizzo 2013), without bias."""
    x, y = (F.adaptive_avg_pool2d(images.double() / 255, 8).flatten(1) for images in (a, b))
    within = sum(torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)


def _packets_themselves(images: Tensor) -> Normal:
    packets = torch.cat([wavelet_packets(part) for part in torch.split(images, 1000)])
    centred = (packets - packets.mean(0)).transpose(0, 1)
    return Normal(packets.mean(0), centred.mT @ centred / (len(packets) - 1))


def measure(overrides: list[str], samples: int, models: str) -> dict[str, Any]:
    """A row for each set of images."""
    config = configure(*overrides)
    data = ensure_prepared(config, config.data)
    if samples > (there := len(data.test.images)):  # a smaller set is further away for that alone
        raise UserError(f"--samples={samples}: there are {there} test images to compare with")
    train = data.train.images
    reference, some = packet_sums(train).normal(), train[:: max(1, len(train) // MANY)]
    raw, few = _packets_themselves(some), some[:: max(1, len(some) // 2000)]
    columns: dict[str, Callable[[Tensor], float]] = {
        "wavelet_distance": lambda images: wavelet_distance(images, reference)[0],
        "of_the_packets": lambda images: frechet_distances(_packets_themselves(images), raw).mean().item(),
        "energy": lambda images: energy_distance(images, few),
    }
    files = [f"model.weights={path}" for path in models.split(",") if path]
    sets = [*spoilt(data.test, samples)]
    for file in files or [None]:
        sets += drawn([*overrides, *([file] if file else [])], samples)
    rows: list[dict[str, Any]] = []
    for title, images in sets:
        images = images.round().clamp(0, 255).to(torch.uint8)
        rows.append({"images": title} | {name: column(images) for name, column in columns.items()})
        rows[-1]["stderr"] = wavelet_distance(images, reference)[1]
    return {"samples": samples, "rows": rows, "machine": describe(torch.device("cpu"))}


def table(found: dict[str, Any]) -> str:
    """As Markdown; the first row is what the others are multiples of."""
    first, *_ = rows = found["rows"]
    names = [name for name in first if name not in ("images", "stderr")]
    lines = [f"| images | wavelet distance | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append("|---|---|" + "---|" * len(names))
    for row in rows:
        cells = [f"{row['wavelet_distance']:.4f} +- {row['stderr']:.4f}"]
        cells += [f"{row[name] / first[name]:.1f}" for name in names]
        lines.append(f"| {row['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


main = partial(run_study, measure, text=table, out=RESULTS / "distances", samples=1000, models="")

if __name__ == "__main__":
    main()
