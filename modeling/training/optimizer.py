"""Optimizers and the learning rate. To add an optimizer: docs/extending.md."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch._dynamo  # every optimizer of PyTorch imports it, which takes a second: here, once for all workers
from torch import Tensor

from modeling.settings.groups import OptimizerConfig
from modeling.settings.keys import own_keys
from modeling.training.muon import Muon

# By the name in the configuration; an optimizer's own keys are its keywords.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "muon": partial(Muon, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
}


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer at its full learning rate; the training loop applies `learning_rate`."""
    return OPTIMIZERS[config.name](parameters, lr=config.lr, **own_keys(config))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (0-based) of `steps`: a linear warm-up times the decay."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = min(step / steps, 1.0)
    decay = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.lr * warmup * decay[config.lr_decay]
