"""What a classifier that no part of the project uses says of samples: `python -m benchmarks.studies.judge out_dir=.`

A residual network that is trained on the training images for --passes and kept. Of --samples of a class-conditional
model, drawn as its recipe draws or as sampler.* say, it prints the Frechet distance of its features to the test images,
and the share that it takes for what they were asked to be: of all and of each class. Beside both, what as many training
images have. --models takes several files or checkpoints, separated by commas. The classifier sees textures rather than
shapes, so look at the pictures too.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.project import RESULTS, compute_of, configure
from modeling.data.prepared import LabelledImages, Prepared, ensure_prepared
from modeling.evaluation.bits_per_dim import standard_error
from modeling.evaluation.distance import GROUPS, Sums, jackknifed
from modeling.inference.device import Compute
from modeling.inference.images import to_model
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import UserError
from modeling.reliability.files import state_root, write_atomic
from modeling.reliability.terminal import counted
from modeling.settings.groups import DataConfig
from modeling.settings.keys import affects
from modeling.stages.sample import as_recipe, check_sampling, load_for

WIDTHS = (64, 128, 256)  # channels; each level halves the image
BATCH = 250
RATE = 0.4  # of SGD at its peak
SMOOTHING = 0.1  # of the labels
SHIFT = 2  # pixels at most by which an image is moved


class Level(nn.Module):
    """Half the height and width, then a convolution beside which its input goes on."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.GELU())
        self.more = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        found: Tensor = x + self.more(x)
        return found


class Judge(nn.Module):
    """From images, [N, C, H, W] in [-1, 1], to features [N, 256], and from these to the classes [N, K]."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        levels = [Level(narrow, wide) for narrow, wide in pairwise([channels, *WIDTHS])]
        self.features = nn.Sequential(*levels, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.classes = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classes(self.features(x))
        return found


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to SHIFT pixels, half of them mirrored; [N, C, H, W]."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, "reflect")
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator).unbind()
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def trained(data: LabelledImages, num_classes: int, passes: int, compute: Compute) -> Judge:
    """A judge, in eval mode on the device."""
    torch.manual_seed(0)
    judge = Judge(data.images.shape[1], num_classes).to(compute.device)
    generator = torch.Generator().manual_seed(0)
    steps = passes * max(1, len(data.images) // BATCH)
    optimizer = torch.optim.SGD(judge.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    for _ in counted("training the judge", range(steps), "steps"):
        if len(order) < min(BATCH, len(data.images)):
            order = torch.randperm(len(data.images), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        images = augmented(to_model(data.images[rows]), generator).to(compute.device)
        with compute.autocast():
            out = judge(images)
        loss = F.cross_entropy(out.float(), data.labels[rows].to(compute.device), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rate.step()
    return judge.eval()


def kept(data: Prepared, passes: int, compute: Compute) -> Judge:
    """As `trained`, kept under the data's SHA-256, this code and the precision."""
    parts = f"{data.sha256['train']} {passes} {compute.bf16} {Path(__file__).read_text()}"
    name = f"judge-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.safetensors"
    path = state_root() / "runs" / "reference" / name
    with suppress(OSError, RuntimeError, SafetensorError):  # absent, or damaged
        judge = Judge(data.shape[0], len(data.classes))
        judge.load_state_dict(load_safetensors(path.read_bytes()))
        return judge.to(compute.device).eval()
    judge = trained(data.train, len(data.classes), passes, compute)
    weights = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    write_atomic(path, safetensors_bytes(weights))
    return judge


@torch.no_grad()
def seen(judge: Judge, images: Tensor, compute: Compute) -> tuple[Tensor, Tensor]:
    """Of uint8 images, the features, float64 [N, 256], and the likeliest classes, [N]."""
    features, classes = [], []
    for part in images.split(BATCH):
        with compute.autocast():
            found = judge.features(to_model(part).to(compute.device))
            classes.append(judge.classes(found).argmax(1).cpu())
        features.append(found.double().cpu())
    return torch.cat(features), torch.cat(classes)


def sums(features: Tensor) -> Sums:
    """As the distance of `evaluate` has them, of one packet."""
    return Sums(len(features), features.sum(0)[None], (features.T @ features)[None])


def drawn(overrides: list[str], samples: int) -> tuple[DataConfig, tuple[str, Tensor, Tensor]]:
    """What a model was trained on; the title, the images and the labels of its samples."""
    config = configure(*overrides)
    compute = compute_of(config)
    model, meta, data = load_for(config, Path(config.out_dir or "."))
    if not model.num_classes:
        raise UserError("the judge asks which class a sample is of, and the model has learned none")
    config = as_recipe(config, meta)
    check_sampling(config, model, meta)
    images = draw_samples(compute.place_model(model), config.sampler, range(samples), meta["image_shape"], compute)
    labels = torch.arange(samples) % model.num_classes
    return data, (f"{meta['steps']:,} steps: {config.sampler.caption()}", images, labels)


def measure(overrides: list[str], samples: int, passes: int, models: str) -> dict[str, Any]:
    """A row for each set of images."""
    config = configure(*overrides)
    compute = compute_of(config)
    if samples < 2 * GROUPS:
        raise UserError(f"--samples={samples}: at least {2 * GROUPS}, for an error of the distance")
    files = [[f"model.weights={path}"] for path in models.split(",") if path] or [[]]
    made_for, sets = zip(*(drawn([*overrides, *file], samples) for file in files), strict=True)
    if any(affects(each, "weights") != affects(made_for[0], "weights") for each in made_for):
        raise UserError("--models: they have learned from different data, and a judge knows one of them")
    data = ensure_prepared(config, made_for[0])
    judge = kept(data, passes, compute)
    features, classes = seen(judge, data.test.images, compute)
    reference = sums(features).normal()

    def rows() -> Iterator[dict[str, Any]]:
        for title, images, labels in [*sets, ("training images", *data.train.first(samples))]:
            features, found = seen(judge, images, compute)
            distance, error = jackknifed(sums(features), map(sums, features.chunk(GROUPS)), reference)
            right = (found == labels).double()
            brightness = images.float().mean((1, 2, 3))
            yield {
                "images": title,
                "distance": distance,
                "distance_stderr": error,
                "recognised": right.mean().item(),
                "recognised_stderr": standard_error(right),
                "brightness": brightness.std().item(),
                "by_class": {c: right[labels == k].mean().item() for k, c in enumerate(data.classes)},
            }

    right = (classes == data.test.labels).double().mean().item()
    return {"samples": samples, "right": right, "rows": [*rows()], "machine": describe(compute.device)}


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    classes = [*found["rows"][0]["by_class"]]
    lines = [f"The judge has {found['right']:.1%} of the test images right. {found['samples']} images a row.", ""]
    lines.append(f"| images | distance | recognised | spread of the mean brightness | {' | '.join(classes)} |")
    lines.append("|---" * (4 + len(classes)) + "|")
    for row in found["rows"]:
        cells = [f"{row['distance']:.2f} +- {row['distance_stderr']:.2f}"]
        cells.append(f"{100 * row['recognised']:.1f} +- {100 * row['recognised_stderr']:.1f} %")
        cells.append(f"{row['brightness']:.1f}")
        cells += ["" if math.isnan(share) else f"{share:.0%}" for share in row["by_class"].values()]
        lines.append(f"| {row['images']} | {' | '.join(cells)} |")
    return "\n".join(lines)


main = partial(run_study, measure, text=table, out=RESULTS / "judge", samples=1000, passes=12, models="")

if __name__ == "__main__":
    main()
