"""Watches the losses for what is not finite, without making the device wait: they stay on it until somebody looks.

What a look finds is the first bad step, although later steps have run by then; since a batch is a function of
(seed, step), that step's batch can be drawn again for whoever wants to know why.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAST = 5  # losses that a report shows


@dataclass(frozen=True)
class Bad:
    """The first step whose loss, gradient or weights are not finite."""

    step: int  # 1-based: the number of steps after it
    losses: list[float]  # the last ones, up to that of the step
    grad_norm: float

    def __str__(self) -> str:
        shown = ", ".join(f"{loss:.4g}" for loss in self.losses)
        what = "loss" if not math.isfinite(self.losses[-1]) else "gradient"
        what = what if not math.isfinite(self.grad_norm + self.losses[-1]) else "weights"
        return f"the {what} of step {self.step} is not finite (last losses {shown}; gradient norm {self.grad_norm:.4g})"


class Watch:
    """Keeps the loss and the gradient norm of every step since the last look."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.before: deque[float] = deque(maxlen=LAST)
        self.norm = 0.0

    def __len__(self) -> int:
        return len(self.values)

    def add(self, values: Tensor) -> None:
        """Notes a step: its loss, its gradient norm and what else there is, on the device."""
        self.values.append(values)

    def look(self, step: int, weights: Sequence[Tensor] = ()) -> Bad | None:
        """Reads what was noted, so it waits for the device, and forgets it.

        Args:
            step: steps done so far, that of the last note.
            weights: must be finite too: the loss of the next step would tell, but a checkpoint comes before it.
        """
        rows = torch.stack(self.values).tolist() if self.values else []
        self.values.clear()
        for k, (loss, self.norm, *_) in enumerate(rows):
            self.before.append(loss)
            if not math.isfinite(loss + self.norm):
                return Bad(step - len(rows) + k + 1, list(self.before), self.norm)
        if weights and not bool(torch.stack([w.isfinite().all() for w in weights]).all()):
            return Bad(step, list(self.before), self.norm)
        return None
