"""The share of class-conditional samples that a small classifier, trained on the training split, takes for their class.

It is no judge of beauty: guidance raises it, and a classifier can be wrong, so its share of right answers on the test
images stands beside it. The classifier is trained once for a data set and kept.
"""

import hashlib
import logging
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from modeling.data.prepared import LabelledImages
from modeling.inference.device import Compute, send
from modeling.inference.images import to_model
from modeling.reliability.files import write_atomic
from modeling.reliability.signals import poll
from modeling.reliability.terminal import counted

log = logging.getLogger(__name__)
WIDTHS = (32, 64, 128)  # channels; each level halves the image
BATCH = 100
EPOCHS = 4, 200_000 * 32 * 32  # at most so many, and at most about so many pixels: a minute on two cores
RATE = 2e-3  # of Adam, falling to 0
SHIFT = 2  # pixels at most by which images are moved in training


def build_classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Six convolutions, the mean of each channel, and one linear layer."""

    def layer(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

    body: list[nn.Module] = []
    for narrow, wide in pairwise([channels, *WIDTHS]):
        body += layer(narrow, wide, 2) + layer(wide, wide, 1)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))


def trained_classifier(data: LabelledImages, num_classes: int, mirror: bool, compute: Compute) -> nn.Module:
    """A classifier of the images, in eval mode on the device; `mirror`: their mirror images are of the same class."""
    n, channels, height, width = data.images.shape
    steps = max(1, math.ceil(min(EPOCHS[0] * n, EPOCHS[1] / (height * width)) / BATCH))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_classifier(channels, num_classes).to(compute.device)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in counted("training the classifier", range(steps), "steps"):
        poll()
        if len(order) < min(BATCH, n):
            order = torch.randperm(n, generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        images = to_model(data.images[rows])
        if mirror:
            images = torch.where(torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
        down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        images = F.pad(images, (SHIFT,) * 4, "reflect")[:, :, down:, right:][:, :, :height, :width]
        with compute.autocast():
            loss = F.cross_entropy(network(send(images, compute.device)), send(data.labels[rows], compute.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        rate.step()
    return network.eval()


def kept_classifier(
    data: LabelledImages, sha256: str, num_classes: int, mirror: bool, compute: Compute, folder: Path
) -> nn.Module:
    """As trained_classifier, kept in `folder` under the data's SHA-256, the code and the precision."""
    code = Path(__file__).read_text()
    key = hashlib.sha256(f"{sha256} {num_classes} {mirror} {compute.bf16} {code}".encode()).hexdigest()[:16]
    path = folder / f"classifier-{key}.safetensors"
    if path.exists():
        try:
            network = build_classifier(data.images.shape[1], num_classes)
            network.load_state_dict(load_safetensors(path.read_bytes()))
            return network.to(compute.device).eval()
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            log.warning("%s is damaged (%s): training it again", path, error)
    trained = trained_classifier(data, num_classes, mirror, compute)
    write_atomic(path, safetensors_bytes({name: value.cpu() for name, value in trained.state_dict().items()}))
    return trained


@torch.no_grad()
def recognised(network: nn.Module, images: Tensor, labels: Tensor, compute: Compute) -> Tensor:
    """1 where the likeliest class of uint8 [N, C, H, W] is the label, else 0; float64 [N]."""
    found = []
    for part in torch.split(images, max(1, BATCH * 32 * 32 // (images.shape[2] * images.shape[3]))):
        poll()
        with compute.autocast():
            found.append(network(send(to_model(part), compute.device)).argmax(1).cpu())
    return (torch.cat(found) == labels).double()
