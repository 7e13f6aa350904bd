"""Exponential moving average of a model's weights: the weights that are sampled from and published.

Ho et al. 2020 use decay 0.9999. The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the
random initial weights are forgotten early in a short run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Keeps the average of `model`'s parameters, in float32, beside it.

    Args:
        model: whose parameters are averaged; the average starts as a copy.
        decay: in [0, 1); 0 follows the weights exactly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's present weights, after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.model.parameters()], 1 - decay)
        self.num_updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """The model with the averaged weights, in eval mode; weights and mode are put back afterwards."""
        training = self.model.training
        kept = [p.data for p in self.model.parameters()]
        self._point_to(self.shadow)
        self.model.eval()
        try:
            yield self.model
        finally:
            self._point_to(kept)
            self.model.train(training)

    def _point_to(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.model.parameters(), tensors, strict=True):
            parameter.data = tensor

    def state_dict(self) -> dict[str, object]:
        """Plain tensors and a number: {"num_updates", "shadow": {name: tensor}}."""
        names = [name for name, _ in self.model.named_parameters()]
        return {"num_updates": self.num_updates, "shadow": dict(zip(names, self.shadow, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores what `state_dict` gave."""
        shadow = state["shadow"]
        assert isinstance(shadow, dict)
        for (name, _), tensor in zip(self.model.named_parameters(), self.shadow, strict=True):
            tensor.copy_(shadow[name])
        self.num_updates = int(state["num_updates"])  # type: ignore[call-overload]  # a state_dict is untyped
