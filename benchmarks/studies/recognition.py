"""Whether class-conditional samples are recognised as their class: `python -m benchmarks.studies.recognition out_dir=.`

A small convolutional classifier is trained on the real training images for --epochs, tested on the real test images,
and then classifies --samples samples of the model, the same number of each class.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import run_study
from benchmarks.machine import describe
from benchmarks.project import compute_of, configure
from modeling.data.prepared import LabelledImages, ensure_prepared
from modeling.inference.images import to_model
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError
from modeling.reliability.terminal import counted
from modeling.stages.sample import load_for

BATCH = 100


def trained_classifier(data: LabelledImages, classes: int, epochs: int) -> nn.Module:
    """Three convolutions, averages and one linear layer; in eval mode."""

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

    torch.manual_seed(0)
    body = [*block(data.images.shape[1], 16), *block(16, 32), *block(32, 64)]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in counted("training the classifier", range(epochs), "epochs"):
        for indices in torch.randperm(len(data.images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(to_model(data.images[indices])), data.labels[indices]).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def recognised(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest class of uint8 [N, C, H, W] is the label, else 0; float64 [N]."""
    found = torch.cat([network(to_model(part)).argmax(1) for part in images.split(BATCH)])
    return (found == labels).double()


def measure(overrides: list[str], samples: int, epochs: int) -> dict[str, Any]:
    """Accuracies on the test images and on the samples, in all and by class."""
    config = configure(*overrides)
    compute = compute_of(config)
    model, meta, data_config = load_for(config, Path(config.out_dir or "."))
    if not model.num_classes:
        raise ConfigError("the model is not class-conditional: train one with model.class_conditional=true")
    data = ensure_prepared(config, data_config)
    network = trained_classifier(data.train, model.num_classes, epochs)
    shape = data.train.images.shape[1:]
    drawn = draw_samples(compute.place_model(model), config.sampler, range(samples), shape, compute)
    labels = torch.arange(samples) % model.num_classes
    right = recognised(network, drawn, labels)
    s = config.sampler
    return {
        "classifier_on_test_images": recognised(network, *data.test).mean().item(),
        "classifier_on_samples": right.mean().item(),
        "by_class": {name: right[labels == k].mean().item() for k, name in enumerate(meta["classes"])},
        "samples": samples,
        "sampler": {"name": s.name, "steps": s.steps, "guidance_scale": s.guidance_scale, "seed": s.seed},
        "weights_sha256": meta["sha256"],
        "machine": describe(compute.device),
    }


main = partial(run_study, measure, samples=1000, epochs=3)

if __name__ == "__main__":
    main()
