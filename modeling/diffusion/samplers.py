"""Samplers: free functions that turn noise x_T into images with a denoiser.

Ancestral DDPM (Ho et al. 2020, algorithm 2), DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, equation 12),
DPM-Solver++ 2M (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2) and UniPC (Zhao et al. 2023,
https://arxiv.org/abs/2302.04867), all on any subsequence of the time steps. To add a sampler: docs/extending.md. Every
sampler takes

    predict: from (x_t [N, C, H, W], t [N]) to a Prediction: DiffusionModel.predict in eval mode with its options bound
    x_T: [N, C, H, W], from N(0, I)
    timesteps: descending, see timestep_subsequence
    alphas_cumprod: float64 [T], of the model's schedule; coefficients are computed from it once a step, in float64
    noise_fn: draws the noise of one step, [N, C, H, W] from N(0, I); never called for the last step

and the sampler's own options, and returns x_0, [N, C, H, W], nominally in [-1, 1].
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.diffusion.model import Prediction

Predict = Callable[[Tensor, Tensor], Prediction]
NoiseFn = Callable[[], Tensor]


LONGEST_STEP = 2.0  # times the step before, in half log-SNR, that a multistep solver takes with second order
MOST_NOISE = 80.0  # of sigma / alpha: more is noise alone (the largest of Karras et al. 2022)


def timestep_subsequence(alphas_cumprod: Tensor, num_steps: int, spacing: str = "uniform") -> list[int]:
    """`num_steps` of the T time steps, descending, with both ends (only T - 1 for a single step).

    Each is the nearest to its place in a spacing of SPACINGS; where that is taken, the nearest that is free and leaves
    room for those after it.

    Args:
        alphas_cumprod: float64 [T], of the model's schedule.
        num_steps: ValueError unless it is 1 to T.
    """
    measure = SPACINGS[spacing](alphas_cumprod).tolist()
    last, gaps = len(measure) - 1, num_steps - 1
    if not 0 <= gaps <= last:
        raise ValueError(f"{num_steps} sampling steps: allowed are 1 to {last + 1}, the steps of the model")
    chosen = [last]
    for k in range(1, gaps):
        place = _place(measure, measure[-1] - k * (measure[-1] - measure[0]) / gaps)
        chosen.append(min(max(last - round(last - place), gaps - k), chosen[-1] - 1))
    return [*chosen, 0] if gaps else chosen


def _place(measure: Sequence[float], value: float) -> float:
    """The index, between two if need be, at which a rising sequence takes the value."""
    after = bisect_left(measure, value, 1, len(measure) - 1)
    gap = measure[after] - measure[after - 1]
    return after - (measure[after] - value) / gap if gap > 0 else after


def _sigma_over_alpha(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().clamp(max=MOST_NOISE)


def _pairs(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, alphas_cumprod at t, alphas_cumprod at the step after it in the sequence; 1 after the last)."""
    table = alphas_cumprod.tolist()
    following = [table[t] for t in timesteps[1:]] + [1.0]
    return [(t, table[t], prev) for t, prev in zip(timesteps, following, strict=True)]


@torch.no_grad()
def ddpm_sample(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, noise_fn: NoiseFn
) -> Tensor:
    """Ancestral sampling with the model's own variance (Ho et al. 2020, algorithm 2).

    The betas of a subsequence are those between its neighbours.
    """
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps):
        x_0, _, fraction = predict(x, _full(x, t))
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        coef1 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
        coef2 = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x = coef1 * x_0 + coef2 * x
        if t != timesteps[-1]:
            small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
            if isinstance(fraction, Tensor):  # learned: between the two in the logarithm
                std = torch.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(small)))
                x = x + std * noise_fn()
            else:
                x = x + math.sqrt(beta if fraction else small) * noise_fn()
    return x


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    x_T: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
    noise_fn: NoiseFn,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12): deterministic at eta = 0, ancestral sampling (`fixed_small`) at eta = 1."""
    x = x_T
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps):
        x_0, eps, _ = predict(x, _full(x, t))
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        x = math.sqrt(alpha_bar_prev) * x_0 + math.sqrt(max(1 - alpha_bar_prev - variance, 0.0)) * eps
        if eta > 0 and t != timesteps[-1]:
            x = x + math.sqrt(variance) * noise_fn()
    return x


@torch.no_grad()
def dpm_solver_sample(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, noise_fn: NoiseFn
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): a second-order multistep solver of the same ODE as DDIM.

    The first step and the last (to the clean image) are of first order, which is a step of DDIM; so is one more than
    twice as long in log-SNR as that before it. It draws no noise.
    """
    return _multistep(predict, x_T, timesteps, alphas_cumprod, corrected=False)


@torch.no_grad()
def unipc_sample(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, noise_fn: NoiseFn
) -> Tensor:
    """UniPC of second order on x_0, with B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 5 and 6).

    A step of DPM-Solver++ 2M predicts; once the network has seen where it leads, the step is taken again with that
    x_0, at no further evaluation. It draws no noise.
    """
    return _multistep(predict, x_T, timesteps, alphas_cumprod, corrected=True)


def _multistep(
    predict: Predict, x_T: Tensor, timesteps: Sequence[int], alphas_cumprod: Tensor, corrected: bool
) -> Tensor:
    x, step = x_T, None
    for t, alpha_bar, alpha_bar_prev in _pairs(alphas_cumprod, timesteps)[:-1]:
        x_0 = predict(x, _full(x, t)).x_0
        if corrected and step is not None:
            x = step.corrected(x_0)
        h = _half_log_snr(alpha_bar_prev) - _half_log_snr(alpha_bar)
        # Two predictions close together say nothing about a step that is much longer.
        earlier = (step.x_0, step.h) if step is not None and h <= LONGEST_STEP * step.h else None
        decay, scale = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)), math.sqrt(alpha_bar_prev)
        step = _Step(decay * x, scale, x_0, h, earlier)
        x = step.predicted()
    return predict(x, _full(x, timesteps[-1])).x_0


class _Step(NamedTuple):
    """A step of length h in half log-SNR: to start + scale * integral of exp(u - h) x_0(u) over u in [0, h]."""

    start: Tensor
    scale: float
    x_0: Tensor  # at u = 0
    h: float
    earlier: tuple[Tensor, float] | None  # x_0 of the step before, at u = -h of that step

    def predicted(self) -> Tensor:
        """2M's rule: x_0 goes on as before; without a step before, it stays."""
        if self.earlier is None:
            return self._midpoint(0.0)
        x_0, h = self.earlier
        return self._midpoint((self.x_0 - x_0) / h)

    def corrected(self, after: Tensor) -> Tensor:
        """The integral of the parabola through the three x_0; `after` is that at u = h."""
        slope = (after - self.x_0) / self.h
        if self.earlier is None:
            return self._midpoint(slope)
        x_0, h = self.earlier
        bend = (slope - (self.x_0 - x_0) / h) / (self.h + h)
        # The integrals of exp(u - h) times 1, u and u (u - h).
        constant = -math.expm1(-self.h)
        linear = self.h - constant
        parabola = self.h**2 - (2 + self.h) * linear
        return self.start + self.scale * (constant * self.x_0 + linear * slope + parabola * bend)

    def _midpoint(self, slope: Tensor | float) -> Tensor:
        return self.start - self.scale * math.expm1(-self.h) * (self.x_0 + self.h / 2 * slope)


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


# By the name in the configuration; a sampler's own keys are its keywords.
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm_sample,
    "ddim": ddim_sample,
    "dpm_solver": dpm_solver_sample,
    "unipc": unipc_sample,
}

# By the name in the configuration: from alphas_cumprod [T] to what rises evenly from step to step, float64 [T].
SPACINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda abar: torch.arange(len(abar), dtype=torch.float64),
    "quadratic": lambda abar: torch.arange(len(abar), dtype=torch.float64).sqrt(),  # Song et al. 2021, appendix D.2
    "log_snr": lambda abar: _sigma_over_alpha(abar).log(),  # minus half of log-SNR
    "karras": lambda abar: _sigma_over_alpha(abar) ** (1 / 7),  # Karras et al. 2022, equation 5
}
