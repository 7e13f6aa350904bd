"""What a training step sees: images, labels, time steps and noise, all of it a function of (seed, step).

So a run that was stopped anywhere resumes with the very next step, and every process of a job knows the whole batch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.data.prepared import LabelledImages
from modeling.diffusion.model import DiffusionModel
from modeling.inference.device import Compute, send, widest
from modeling.inference.images import to_model
from modeling.seeds import step_seed
from modeling.settings.groups import Config


def draw_timesteps(n: int, num_timesteps: int, stratified: bool, generator: torch.Generator) -> Tensor:
    """int64 [n] in [0, T), on the generator's device.

    Uniform and independent, or stratified: still uniform each, but evenly spread over the batch (Kingma et al. 2021,
    appendix I.1), which lowers the variance of the loss.
    """
    device = generator.device
    if not stratified:
        return torch.randint(num_timesteps, (n,), generator=generator, device=device)
    offset = torch.rand((), generator=generator, device=device, dtype=widest(device))
    spread = (offset + torch.arange(n, device=device) / n) % 1
    return (spread * num_timesteps).long().clamp(max=num_timesteps - 1)


class BatchSource:
    """Draws the images of each step: every epoch is a permutation, and a batch may span two epochs.

    The images are on the device that trains, or memory-mapped, the labels on the CPU. `random_flip` mirrors each image
    left to right with probability 1/2.
    """

    def __init__(self, data: LabelledImages, batch_size: int, seed: int, random_flip: bool) -> None:
        self.images, self.all_labels = data
        self.batch_size = batch_size
        self.seed = seed
        self.random_flip = random_flip
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.seed, "order", epoch))
        return torch.randperm(len(self.images), generator=generator)

    def indices(self, step: int) -> Tensor:
        """int64 [B]: which images step `step` (0-based) trains on."""
        n = len(self.images)
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        for epoch in range(first // n, (last - 1) // n + 1):
            parts.append(self._permutation(epoch)[max(first - epoch * n, 0) : last - epoch * n])
        return torch.cat(parts)

    def labels(self, step: int) -> Tensor:
        """int64 [B]: the labels of `batch(step)`, on the CPU."""
        return self.all_labels[self.indices(step)]

    def batch(self, step: int) -> Tensor:
        """float32 [B, C, H, W] in [-1, 1], on the device of the images."""
        device = self.images.device
        images = self.images.index_select(0, send(self.indices(step), device))
        if self.random_flip:
            generator = torch.Generator().manual_seed(step_seed(self.seed, "flip", step))
            flip = torch.rand(self.batch_size, generator=generator) < 0.5
            both = torch.cat([images, images.flip(3)])  # a selection from both takes half the time of torch.where
            images = both.index_select(0, send(torch.arange(self.batch_size) + self.batch_size * flip, device))
        return to_model(images.contiguous())


class StepInputs(NamedTuple):
    """What the loss of a step is computed from, on the device."""

    x_0: Tensor  # float32 [B, C, H, W] in [-1, 1]
    t: Tensor  # int64 [B] in [0, T)
    noise: Tensor  # as x_0, from N(0, I)
    y: Tensor | None  # int64 [B]; num_classes means "no label"; None: the model takes no labels

    def part(self, rows: slice) -> "StepInputs":
        """The inputs of some rows of the batch."""
        return StepInputs(self.x_0[rows], self.t[rows], self.noise[rows], None if self.y is None else self.y[rows])


class InputSource:
    """Draws the inputs of each step for the global batch."""

    def __init__(self, config: Config, train: LabelledImages, model: DiffusionModel, compute: Compute) -> None:
        self.config = config.trainer
        self.seed = config.seed
        self.num_timesteps = model.schedule.num_timesteps
        self.num_classes = model.num_classes
        self.compute = compute
        placed = LabelledImages(compute.place(train.images), train.labels)
        self.batches = BatchSource(placed, self.config.batch_size, self.seed, self.config.random_flip)

    def inputs(self, step: int) -> StepInputs:
        """The inputs of step `step` (0-based)."""
        device = self.compute.device
        x_0 = send(self.batches.batch(step), device)
        generator = self.compute.generator(step_seed(self.seed, "noise", step))
        stratified = self.config.timestep_sampling == "stratified"
        t = draw_timesteps(len(x_0), self.num_timesteps, stratified, generator)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        return StepInputs(x_0, t, noise, self.labels(step) if self.num_classes else None)

    def labels(self, step: int) -> Tensor:
        """int64 [B], on the device; a share of them means "no label", for classifier-free guidance."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, "label dropout", step))
        labels = self.batches.labels(step)
        dropped = torch.rand(len(labels), generator=generator) < self.config.label_dropout
        return send(torch.where(dropped, self.num_classes, labels), self.compute.device)
