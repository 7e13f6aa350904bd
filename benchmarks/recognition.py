"""Whether each class-conditional sample is recognised as its class: `python -m benchmarks.recognition out_dir=.`

A small convolutional classifier is trained on the real training images, tested on the real test images, and asked about
samples of the model, the same number of each class.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.project import command_line, configure
from modeling.data.prepared import Prepared
from modeling.inference.device import choose_compute
from modeling.inference.images import to_model
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError
from modeling.stages.prepare import ensure_prepared
from modeling.stages.sample import load_for

BATCH = 100


def classifier(channels: int, classes: int) -> nn.Module:
    """Three convolutions, averages, one linear layer."""

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

    body = [*block(channels, 16), *block(16, 32), *block(32, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def trained_classifier(images: Tensor, labels: Tensor, classes: int, epochs: int) -> nn.Module:
    """Trained on uint8 [N, C, H, W] and int64 [N]; in eval mode."""
    torch.manual_seed(0)
    network = classifier(images.shape[1], classes)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(to_model(images[indices])), labels[indices]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def predicted(network: nn.Module, images: Tensor) -> Tensor:
    """The likeliest class of each of uint8 [N, C, H, W], int64 [N]."""
    return torch.cat([network(to_model(part)).argmax(1) for part in images.split(BATCH)])


def measure(count: int, epochs: int, overrides: list[str]) -> dict[str, Any]:
    """Accuracies on the test images and on `count` samples, in all and by class."""
    config = configure(*overrides)
    compute = choose_compute(config.device, config.precision, config.deterministic)
    model, meta, data = load_for(config, Path(config.out_dir or "."))
    if not model.num_classes:
        raise ConfigError("the model is not class-conditional: train one with model.class_conditional=true")
    source = ensure_prepared(config, data)
    train, test = Prepared(source, "train"), Prepared(source, "test")
    network = trained_classifier(train.images, train.labels, model.num_classes, epochs)
    height, width, channels = meta["image_shape"]
    s = config.sampler
    samples = draw_samples(compute.place_model(model), s, range(count), (channels, height, width), compute)
    asked = torch.arange(count) % model.num_classes
    right = (predicted(network, samples) == asked).double()
    by_class = {name: right[asked == k].mean().item() for k, name in enumerate(meta["classes"])}
    return {
        "classifier_on_test_images": (predicted(network, test.images) == test.labels).double().mean().item(),
        "classifier_on_samples": right.mean().item(),
        "by_class": by_class,
        "samples": count,
        "sampler": {"name": s.name, "steps": s.steps, "guidance_scale": s.guidance_scale, "seed": s.seed},
        "weights_sha256": meta["sha256"],
        "machine": describe(compute.device),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3, help="of the classifier")
    parser.add_argument("overrides", nargs="*", help="of the configuration: out_dir=. sampler.guidance_scale=3")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.samples, arguments.epochs, arguments.overrides), indent=2))


if __name__ == "__main__":
    command_line(main)
