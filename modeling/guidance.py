"""Classifier-free guidance of a class-conditional model (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).

The prediction is pushed away from what the network says without a label: unconditional + scale * (conditional -
unconditional), so scale 1 is the conditional model and 0 the unconditional one.
"""

import torch
from torch import Tensor

from modeling.diffusion import DiffusionModel, Prediction
from modeling.schedule import NoiseSchedule


class Guided:
    """A Denoiser for the samplers.

    Args:
        model: class-conditional, in eval mode.
        y: int64 [N], the label of each sample; the batch must have N samples in this order.
        null_label: the label that stands for none.
        scale: of the guidance; at 1 the network runs once a step, else twice as many images.
    """

    def __init__(self, model: DiffusionModel, y: Tensor, null_label: int, scale: float) -> None:
        self.model = model
        self.y = y
        self.null_label = null_label
        self.scale = scale

    @property
    def schedule(self) -> NoiseSchedule:
        """The model's."""
        return self.model.schedule

    @property
    def variance(self) -> str:
        """The model's."""
        return self.model.variance

    def predict(self, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Prediction:
        """As DiffusionModel.predict, guided. A learned variance is that of the conditional prediction."""
        if self.scale == 1:
            return self.model.predict(x_t, t, clip_denoised, self.y)
        y = torch.cat([self.y, torch.full_like(self.y, self.null_label)])
        conditional, unconditional = self.model.run_network(torch.cat([x_t, x_t]), torch.cat([t, t]), y).chunk(2)
        # Linear in the output, so it is the same guidance whatever the prediction type.
        output = unconditional + self.scale * (conditional - unconditional)
        if self.variance == "learned":
            output = torch.cat([output.chunk(2, dim=1)[0], conditional.chunk(2, dim=1)[1]], dim=1)
        return self.model.interpret(output, x_t, t, clip_denoised)
