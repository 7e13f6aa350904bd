"""Data whose ODE is solved exactly: every pixel drawn by itself from one mixture of normal distributions."""

from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """A mixture on the line, under the forward process of a schedule; each tuple has a number for each component."""

    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    means: tuple[float, ...] = (-0.6, 0.1, 0.8)
    stds: tuple[float, ...] = (0.1, 0.2, 0.05)

    def _parts(self, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, means, stds = (torch.tensor(values, dtype=torch.float64) for values in self)
        a = alpha_bar.double().unsqueeze(-1)
        return weights, means, stds**2, a * stds**2 + 1 - a

    def denoise(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """E[x_0 | x_t], in the shape and dtype of x_t; `alpha_bar` broadcasts against it."""
        weights, means, variances, noisy = self._parts(alpha_bar)
        a = alpha_bar.double().unsqueeze(-1)
        off = x_t.double().unsqueeze(-1) - a.sqrt() * means
        share = torch.softmax(weights.log() - noisy.log() / 2 - off**2 / (2 * noisy), -1)
        return (share * (means + a.sqrt() * variances / noisy * off)).sum(-1).to(x_t.dtype)

    def cdf(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """The share of x_t below, float64."""
        weights, means, _, noisy = self._parts(alpha_bar)
        off = x_t.double().unsqueeze(-1) - alpha_bar.double().unsqueeze(-1).sqrt() * means
        return (weights * torch.special.ndtr(off / noisy.sqrt())).sum(-1)

    def solution(self, x: Tensor, alpha_bar: Tensor, alpha_bar_to: Tensor) -> Tensor:
        """Where the ODE leads from x at `alpha_bar`, float64: on the line it keeps every quantile."""
        wanted = self.cdf(x, alpha_bar)
        low, high = torch.full_like(x, -50).double(), torch.full_like(x, 50).double()
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha_bar_to) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
