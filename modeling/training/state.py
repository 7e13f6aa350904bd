"""The state of a training run: all that a checkpoint holds, how it is saved, and how a run resumes from it.

Order, flips, time steps, noise and dropout are functions of (seed, step), so they need no saving. Every process has the
whole state; the first alone saves it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.checkpoints.checkpoint import Damaged, read_checkpoint, restore_newest, save_checkpoint
from modeling.diffusion.model import DiffusionModel
from modeling.distributed.collectives import barrier, from_first, is_first
from modeling.inference.device import widest
from modeling.reliability.errors import ConfigError, UserError, out_of_memory, short
from modeling.training.ema import EMA

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFolder:
    """Where the rolling checkpoints of a run are. The first process alone uses it."""

    path: Path = Path()
    about: Mapping[str, Any] = field(default_factory=dict)  # written into every checkpoint: what it belongs to
    start: Path | None = None  # a checkpoint, maybe of another run, to start from if the folder has none


class TrainingState:
    """Weights, EMA, optimizer, and how far the run has come."""

    def __init__(
        self, model: DiffusionModel, ema: EMA[DiffusionModel], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.device = device
        self.step = 0  # optimizer steps done
        self.images = 0  # seen in them
        self.seconds = 0.0  # of training and saving, without evaluation and sampling
        self.guide: dict[str, Tensor] | None = None  # averaged weights of the network at an earlier step, on the CPU
        self.sums: dict[
            str, Tensor
        ] = {}  # of each logged value since the last log, float64 on the device if it has that,
        self.count = 0  # over so many steps

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of a step to the sums."""
        if self.sums.keys() != values.keys():  # at first, or after a checkpoint of code that logged other values
            zero = torch.zeros((), dtype=widest(self.device), device=self.device)
            self.sums, self.count = dict.fromkeys(values, zero), 0
        self.sums = {name: self.sums[name] + value for name, value in values.items()}
        self.count += 1

    def keep_guide(self) -> None:
        """The averaged weights, as they are now, are the guide."""
        weights = self.ema.model.network.state_dict()
        self.guide = {name: value.detach().cpu().clone() for name, value in weights.items()}

    def mean_loss(self) -> float:
        """The mean loss since the last call of `means`, after at least one step. Waits for the device."""
        return self.sums["loss"].item() / self.count

    def means(self) -> dict[str, float]:
        """The mean of each logged value since the last call. Waits for the device."""
        means = {name: total.item() / max(self.count, 1) for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def save(self, folder: CheckpointFolder) -> None:
        """Writes a checkpoint, else raises UserError. Returns in no process before the file exists."""
        if is_first():
            save_checkpoint(folder.path, self.step, {"about": dict(folder.about), **self.state_dict()})
        barrier()  # no process may report that all is saved before it is

    def resume(self, folder: CheckpointFolder, steps: int) -> None:
        """Goes on from the newest checkpoint of the folder; if it has none, from `folder.start`; else from step 0.

        All processes take over the state that the first one has read. UserError if there are checkpoints and none can
        be used, or if the state is beyond `steps`: then another process has trained in the meantime.
        """
        if is_first() and not restore_newest(folder.path, self.load_state_dict) and folder.start is not None:
            try:
                self.load_state_dict(read_checkpoint(folder.start))
            except Damaged as error:
                raise ConfigError(f"trainer.resume={folder.start}: {error}") from None
            if self.step > steps:
                raise ConfigError(f"trainer.resume={folder.start}: it is of step {self.step}, trainer.steps={steps}")
        if self.step > steps:
            raise UserError(f"the newest checkpoint in {folder.path} is of step {self.step} by now: run this again")
        state = from_first(self.state_dict)
        if not is_first():
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "device": self.device.type,
            "sums": {name: total.cpu() for name, total in self.sums.items()},
            "count": self.count,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "guide": self.guide,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the options of the optimizer remain those of the configuration.

        Damaged if it is of another network or optimizer, or not whole.
        """
        groups = self.optimizer.param_groups
        try:
            if {*state["optimizer"]["param_groups"][0]} != {*groups[0]}:
                raise ValueError("it is of another optimizer")
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.guide = self._as_guide(state.get("guide"))  # those of earlier versions have none
            options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group.update(own)
            self._lay_out_moments()
            if state["device"] != self.device.type:
                log.warning("the state was made on %s: random numbers differ on %s", state["device"], self.device.type)
            self.sums = {name: total.to(widest(self.device)).to(self.device) for name, total in state["sums"].items()}
            self.count = int(state["count"])
            self.step, self.images, self.seconds = int(state["step"]), int(state["images"]), float(state["seconds"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise Damaged(short(error)) from None

    def _as_guide(self, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """A guide that was saved, as it is; ValueError if it is of another network."""
        if state is None:
            return None
        shapes = {name: value.shape for name, value in state.items()}
        if shapes != {name: value.shape for name, value in self.ema.model.network.state_dict().items()}:
            raise ValueError("its guide is of another network")
        return state

    def _lay_out_moments(self) -> None:
        """Gives the optimizer's state the memory layout of the parameters, which fused kernels assume."""
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter).copy_(value)
