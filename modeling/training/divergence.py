"""A training that diverges ends with the first step whose loss, gradient or weights are not finite."""

import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoints.checkpoint import checkpoints
from modeling.distributed.collectives import from_first, is_first
from modeling.reliability.errors import UserError
from modeling.reliability.files import replacing
from modeling.settings.groups import Config
from modeling.training.batches import InputSource
from modeling.training.optimizer import learning_rate
from modeling.training.state import CheckpointFolder


class Divergence:
    """Takes the loss and the gradient norm of each step, on the device, and reads them when it is asked to check."""

    def __init__(self, config: Config, source: InputSource, folder: CheckpointFolder) -> None:
        self.config = config
        self.source = source
        self.folder = folder
        self.unchecked: list[Tensor] = []  # of each step since the last check
        self.recent: deque[float] = deque(maxlen=5)  # losses for the message

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Takes the values of a step."""
        self.unchecked.append(torch.stack([loss, norm]))

    def check(self, step: int, weights: Sequence[Tensor] = ()) -> None:
        """Waits for the device; UserError if something is not finite in one of the steps up to `step`, the last one."""
        rows = torch.stack(self.unchecked).tolist() if self.unchecked else []
        self.unchecked.clear()
        norm = math.nan
        for past, (loss, norm) in enumerate(rows, step - len(rows) + 1):
            self.recent.append(loss)
            if not math.isfinite(loss + norm):
                raise self._error("gradient" if math.isfinite(loss) else "loss", past, norm)
        if weights and not bool(torch.stack([w.isfinite().all() for w in weights]).all()):
            raise self._error("weights", step, norm)

    def _error(self, what: str, step: int, norm: float) -> UserError:
        """The error to raise; the batch of the step, a function of (seed, step), is kept in the folder."""
        rate = learning_rate(self.config.optimizer, step - 1, self.config.trainer.steps)
        path = Path(from_first(lambda: str(self.folder.path / f"bad-step-{step:09}.pt")))
        inputs = self.source.inputs(step - 1)._asdict()
        batch = {name: None if value is None else value.cpu() for name, value in inputs.items()}
        batch |= {"step": step, "lr": rate, "losses": [*self.recent]}
        batch["indices"] = self.source.batches.indices(step - 1)
        if is_first():
            with suppress(UserError), replacing(path) as partial:  # a full disk must not hide the reason
                torch.save(batch, partial)
        good = from_first(lambda: [str(p) for p in checkpoints(self.folder.path)])
        losses = ", ".join(f"{loss:.4g}" for loss in self.recent)
        advice = "lower optimizer.lr, raise optimizer.warmup_steps, set optimizer.grad_clip=1.0 or precision=fp32"
        if good:
            advice += f", from the last good checkpoint with trainer.resume={good[-1]}"
        return UserError(
            f"the {what} of step {step} is not finite (last losses {losses}; gradient norm {norm:.4g}), "
            f"learning rate {rate:.4g}: {advice}; the batch of that step is in {path}"
        )
