"""The state of a training run: all that a checkpoint holds, how it is saved, and how a run takes it up again.

What is not in it needs no saving: order, flips, time steps, noise and dropout are functions of (seed, step). Of several
processes, each has the whole state and the first alone saves it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.checkpoint import Damaged, read_checkpoint, restore_newest, save_checkpoint
from modeling.distributed import barrier, from_first, is_first
from modeling.ema import EMA
from modeling.errors import ConfigError, UserError
from modeling.faults import out_of_memory

log = logging.getLogger(__name__)


class TrainingState:
    """Weights, EMA, optimizer, and how far the run has come.

    Args:
        model: fresh, on the device.
        ema: of the model.
        optimizer: over its parameters.
        device: of the sums.
        about: written into every checkpoint: whose it is.
    """

    def __init__(
        self,
        model: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.about = dict(about or {})
        self.step = 0  # optimizer steps done
        self.images = 0  # seen in them
        self.seconds = 0.0  # of training and saving, without evaluation and sampling
        # Sums of loss and gradient norm since the last log, and their number.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint of the present step. Returns in no process before it is there.

        Raises:
            UserError: the folder cannot be written; the earlier checkpoints are intact.
        """
        if is_first():
            save_checkpoint(folder, self.step, self.state_dict())
        barrier()  # nobody says that all is saved before it is

    def take_up(self, folder: Path, start: Path | None, steps: int) -> None:
        """Goes on from the newest checkpoint of `folder`; if there is none, from `start`; if that is None, afresh.

        All processes go on from what the first has found.

        Args:
            folder: of the rolling checkpoints; the first process's.
            start: a checkpoint that may be of another run.
            steps: how far the run is to go.

        Raises:
            ConfigError: `start` cannot be used.
            UserError: there are checkpoints in the folder, and none of them can be used; or the newest is of a later
                step, so that another process has trained in the meantime.
        """
        if is_first() and not restore_newest(folder, self.load_state_dict) and start is not None:
            try:
                self.load_state_dict(read_checkpoint(start))
            except Damaged as error:
                raise ConfigError(f"trainer.resume={start}: {error}") from None
            if self.step > steps:
                raise ConfigError(f"trainer.resume={start}: it is of step {self.step}, trainer.steps={steps}")
        if self.step > steps:
            raise UserError(f"the newest checkpoint in {folder} is of step {self.step} by now: run this again")
        state = from_first(self.state_dict)
        if not is_first():
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: plain types and tensors."""
        return {
            "about": self.about,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "device": self.sums.device.type,
            "sums": self.sums.cpu(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _lay_out_moments(self) -> None:
        """Gives the optimizer's state the memory layout of the parameters: fused kernels take it for granted.

        The layout of a CPU's checkpoint is another one than that of CUDA.
        """
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter).copy_(value)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave; the settings of the optimizer remain those of the configuration.

        Raises:
            Damaged: it is of another network or optimizer, or not whole.
        """
        groups = self.optimizer.param_groups
        try:
            if {*state["optimizer"]["param_groups"][0]} != {*groups[0]}:
                raise ValueError("it is of another optimizer")
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(setting)
            self._lay_out_moments()
            if state["device"] != self.sums.device.type:
                log.warning(
                    "the state was made on %s: other random numbers on %s", state["device"], self.sums.device.type
                )
            self.sums.copy_(state["sums"])
            self.step, self.images, self.seconds = int(state["step"]), int(state["images"]), float(state["seconds"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise Damaged(" ".join(str(error).split())[:120]) from None
