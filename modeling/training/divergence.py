"""Finds the first step whose loss, gradient or weights are not finite, without making the device wait for the host.

Losses stay on the device until `find` reads them, so later steps may have run by then. Since a batch is a function of
(seed, step), the batch of the step that was found can be drawn again.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHOWN = 5  # losses in the message


@dataclass(frozen=True)
class Divergence:
    """The first step whose loss, gradient or weights are not finite."""

    step: int  # 1-based: the number of steps after it
    losses: list[float]  # the last ones, up to that of the step
    grad_norm: float

    def __str__(self) -> str:
        shown = ", ".join(f"{loss:.4g}" for loss in self.losses)
        what = "loss" if not math.isfinite(self.losses[-1]) else "gradient"
        what = what if not math.isfinite(self.grad_norm + self.losses[-1]) else "weights"
        return f"the {what} of step {self.step} is not finite (last losses {shown}; gradient norm {self.grad_norm:.4g})"


class DivergenceCheck:
    """Keeps the loss and the gradient norm of every step since the last call of `find`."""

    def __init__(self) -> None:
        self._unread: list[Tensor] = []
        self._losses: deque[float] = deque(maxlen=SHOWN)
        self._norm = 0.0

    def __len__(self) -> int:
        return len(self._unread)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Keeps the values of a step, on the device."""
        self._unread.append(torch.stack([loss, norm]))

    def find(self, step: int, weights: Sequence[Tensor] = ()) -> Divergence | None:
        """The divergence in the steps since the last call, if there is one. Waits for the device.

        Args:
            step: steps done so far, that of the last `add`.
            weights: must be finite too: the loss of the next step would show it, but a checkpoint comes before.
        """
        rows = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for k, (loss, self._norm) in enumerate(rows):
            self._losses.append(loss)
            if not math.isfinite(loss + self._norm):
                return Divergence(step - len(rows) + k + 1, list(self._losses), self._norm)
        if weights and not bool(torch.stack([w.isfinite().all() for w in weights]).all()):
            return Divergence(step, list(self._losses), self._norm)
        return None
