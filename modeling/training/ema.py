"""Exponential moving average of a model's weights: the weights that are sampled from and published.

Ho et al. 2020 use decay 0.9999. The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the
random initial weights are forgotten early in a short run.
"""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """Keeps the average of a model's parameters in a copy of the model, in eval mode.

    Args:
        source: the model; its copy, `model`, starts with the same weights.
        decay: in [0, 1); 0 follows the weights exactly.
    """

    def __init__(self, source: Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        # Its parameters keep requires_grad, although nothing differentiates it: autocast then casts each only once.
        self.model = copy.deepcopy(source).eval()
        self._source_parameters = [p.detach() for p in source.parameters()]
        self._parameters = [p.detach() for p in self.model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present weights, after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._parameters, self._source_parameters, 1 - decay)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a number."""
        return {"num_updates": self.num_updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.num_updates = int(state["num_updates"])
