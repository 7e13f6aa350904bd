"""The likelihood of a trained model: the held-out loss, also by quartile of the time steps, and bits/dim in its parts.

Bits/dim is the variational bound (Ho et al. 2020, equation 5; its terms are in diffusion/bound.py) over test images.
With fewer time steps an image than T, they are drawn from strata that grow geometrically, since the terms fall steeply
with t; the estimate stays unbiased, and its standard error contains the spread of the draw.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modeling.data.prepared import LabelledImages
from modeling.diffusion.bound import prior_term
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.shares import sharded_batches
from modeling.inference.device import Compute
from modeling.inference.held_out import SEED, held_out_losses, model_inputs
from modeling.inference.samples import SampleNoise
from modeling.reliability.signals import poll
from modeling.seeds import step_seed


def held_out_report(model: DiffusionModel, data: LabelledImages, batch_size: int, compute: Compute) -> dict[str, Any]:
    """The mean held-out loss of a split, and the mean of each quartile of t."""
    losses, t = held_out_losses(model, data, batch_size, compute)
    quartile = t * 4 // model.schedule.num_timesteps
    parts = {f"q{k + 1}": losses[quartile == k].mean().item() for k in range(4) if bool((quartile == k).any())}
    return {"loss": losses.double().mean().item(), "loss_by_t": parts, "loss_images": len(losses)}


def strata(num_timesteps: int, count: int | None) -> list[tuple[int, int]]:
    """Splits t = 1 ... T - 1 into at most `count` ranges [first, end) that grow geometrically; None: one for each t."""
    if count is None or count >= num_timesteps - 1:
        return [(t, t + 1) for t in range(1, num_timesteps)]
    ends = [1]
    for left in range(count, 1, -1):
        # The rest is divided evenly on a logarithmic scale, but no range is empty.
        ideal = ends[-1] * (num_timesteps / ends[-1]) ** (1 / left)
        ends.append(max(ends[-1] + 1, round(ideal)))
    return list(pairwise([*ends, num_timesteps]))


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values, [N]; NaN where a single one says nothing of the spread."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


@torch.no_grad()
def bits_per_dim(
    model: DiffusionModel, data: LabelledImages, batch_size: int, timesteps: int | None, compute: Compute
) -> dict[str, Any]:
    """The variational bound in bits a dimension, its standard error over the images, and the parts that it sums.

    `timesteps` are drawn for each image; None: all of them. All processes must call this.
    """

    ranges = strata(model.schedule.num_timesteps, timesteps)

    def terms(indices: range, tell: Callable[[float], None]) -> Tensor:
        """Prior, middle and decoder of images `indices`, float64 [N, 3] on the CPU, in bits a dimension."""
        x_0, y = model_inputs(model, data, indices, compute)
        noise = SampleNoise(SEED + 1, indices, x_0.shape[1:], compute.device)
        generators = [torch.Generator().manual_seed(step_seed(SEED, "bits", k)) for k in indices]

        def term(t: Tensor) -> Tensor:
            poll()
            with compute.autocast():
                return model.bound_term(x_0, t.to(compute.device), noise(), y=y).cpu().double()

        decoder = term(torch.zeros(len(x_0), dtype=torch.int64))
        middle = torch.zeros(len(x_0), dtype=torch.float64)
        for k, (first, end) in enumerate(ranges):
            tell(k / len(ranges))
            t = torch.cat([torch.randint(first, end, (1,), generator=g) for g in generators])
            middle += (end - first) * term(t)
        return torch.stack([prior_term(model.schedule, x_0).cpu().double(), middle, decoder], dim=1)

    empty = torch.empty(0, 3, dtype=torch.float64)
    table = sharded_batches("bits/dim", len(data.images), batch_size, terms, empty).T.contiguous()  # [3, N]
    total, n = table.sum(0), table.shape[1]
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_stderr": standard_error(total),
        "bits_per_dim_parts": dict(zip(("prior", "middle", "decoder"), table.mean(1).tolist(), strict=True)),
        "bits_per_dim_images": n,
        "bits_per_dim_timesteps": min(timesteps or model.schedule.num_timesteps, model.schedule.num_timesteps),
    }
