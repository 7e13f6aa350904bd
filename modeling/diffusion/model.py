"""The diffusion model: forward process q, its posterior, the network's prediction, the loss and the variational bound.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), equations 4 to 7, 12, 14 and 15; v-prediction is Salimans and Ho 2022
(https://arxiv.org/abs/2202.00512), the learned variance and its hybrid loss Nichol and Dhariwal 2021
(https://arxiv.org/abs/2102.09672), min-SNR weighting Hang et al. 2023 (https://arxiv.org/abs/2303.09556), classifier-
free guidance Ho and Salimans 2022 (https://arxiv.org/abs/2207.12598), autoguidance Karras et al. 2024
(https://arxiv.org/abs/2406.02507). Images are [N, C, H, W] in [-1, 1]; `t` is int64 [N] in [0, T), 0-based; noise is
from N(0, I); labels `y` are int64 [N]. No randomness: callers pass noise and t.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modeling.diffusion import bound
from modeling.diffusion.schedule import NoiseSchedule, gather

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned")
VLB_WEIGHT = 0.001  # of the bound in the hybrid loss (Nichol and Dhariwal 2021, section 3.1)


class Prediction(NamedTuple):
    """What the network says about x_t: the clean image and the noise in it, both [N, C, H, W].

    `fraction` places the log-variance of the reverse step: 0 is that of the posterior, 1 that of beta. It is a number
    for the fixed variances and [N, C, H, W] for the learned one.
    """

    x_0: Tensor
    eps: Tensor
    fraction: Tensor | float


class DiffusionModel(nn.Module):
    """A network under a noise schedule.

    Args:
        network: maps (x_t [N, C, H, W], t [N]) to a prediction, [N, C, H, W]; twice the channels if the variance is
            learned. A class-conditional network takes labels [N] as a third argument.
        prediction_type: what the network predicts; one of PREDICTION_TYPES.
        variance: of the reverse steps, one of VARIANCES: "fixed_large" is beta_t, "fixed_small" the variance of the
            posterior, "learned" lies between the two and is trained by the hybrid loss.
        min_snr_gamma: weights the training loss by min(SNR, gamma) relative to the loss on x_0; None: no weights.
        guide: a worse network of the same form, such as the same one at an earlier step, for autoguidance; or none.
    """

    loss_weights: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        variance: str = "fixed_large",
        min_snr_gamma: float | None = None,
        guide: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if variance not in VARIANCES:
            raise ValueError(f"variance {variance!r} is none of {', '.join(VARIANCES)}")
        self.network = network
        self.guide = guide
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.variance = variance
        self.min_snr_gamma = min_snr_gamma
        # A squared error of x_0 is SNR times smaller than the same error as noise, and SNR + 1 times than as v.
        snr = schedule.snr
        scale = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
        weights = torch.ones_like(snr) if min_snr_gamma is None else snr.clamp(max=min_snr_gamma) / scale
        self.register_buffer("loss_weights", weights, persistent=False)

    @property
    def num_classes(self) -> int:
        """The number of classes of a class-conditional network, whose label `num_classes` means "no label"; else 0."""
        return int(getattr(self.network, "num_classes", 0))

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0), equation 4: sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise."""
        signal, sigma = self._signal_and_sigma(t, x_0)
        return signal * x_0 + sigma * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, C, H, W] and variance [N, 1, 1, 1] of q(x_{t-1} | x_t, x_0), equation 7."""
        s = self.schedule
        mean = gather(s.posterior_mean_coef1, t, x_t) * x_0 + gather(s.posterior_mean_coef2, t, x_t) * x_t
        return mean, gather(s.posterior_variance, t, x_t)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        y: Tensor | None = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
    ) -> Prediction:
        """The network's estimate of the clean image and of the noise.

        Args:
            clip_denoised: clip x_0 to [-1, 1], the range of the data; eps is then the noise that fits the clipped x_0.
            guidance_scale: of classifier-free guidance: 1 is the conditional model, 0 the one without labels. At any
                other value than 1 the network sees twice as many images.
            autoguidance_scale: 1 is the model, 0 its guide; above 1, the prediction goes as many times as far from the
                guide's. At any other value than 1 the guide sees the images too. The two kinds of guidance add up.
                A learned variance is that of the network, unguided.
        """
        if y is None or guidance_scale == 1:
            output = plain = self.run_network(x_t, t, y)
        else:
            labels = torch.cat([y, torch.full_like(y, self.num_classes)])
            plain, unconditional = self.run_network(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
            # Linear in the output, so it is the same guidance for every prediction type.
            output = unconditional + guidance_scale * (plain - unconditional)
        if autoguidance_scale != 1:
            if self.guide is None:
                raise ValueError("autoguidance: the model has no guide")
            output = output + (autoguidance_scale - 1) * (plain - _run(self.guide, x_t, t, y))
        if self.variance == "learned" and output is not plain:
            output = torch.cat([output.chunk(2, dim=1)[0], plain.chunk(2, dim=1)[1]], dim=1)
        return self.interpret(output, x_t, t, clip_denoised)

    def run_network(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The raw output of the network in the dtype of x_t."""
        return _run(self.network, x_t, t, y)

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool) -> Prediction:
        """The meaning of an output of the network for x_t, under any prediction type."""
        fraction: Tensor | float = float(self.variance == "fixed_large")
        if self.variance == "learned":
            output, raw = output.chunk(2, dim=1)
            fraction = (raw + 1) / 2
        signal, sigma = self._signal_and_sigma(t, x_t)
        if self.prediction_type == "epsilon":
            eps, x_0 = output, (x_t - sigma * output) / signal
        elif self.prediction_type == "sample":
            x_0, eps = output, (x_t - signal * output) / sigma
        else:  # v = signal eps - sigma x_0
            x_0, eps = signal * x_t - sigma * output, sigma * x_t + signal * output
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
            eps = (x_t - signal * x_0) / sigma
        return Prediction(x_0, eps, fraction)

    def log_variance(self, t: Tensor, like: Tensor, fraction: Tensor | float) -> Tensor:
        """Log-variance of the reverse step p(x_{t-1} | x_t) over all T steps, in the dtype of `like`.

        [N, 1, 1, 1], or [N, C, H, W] if it is learned. At t = 0 it is the decoder's: that of the posterior at t = 1,
        since the posterior's own is 0 there (as in Ho et al.'s code).
        """
        s = self.schedule
        small, large = s.posterior_variance.clone(), s.betas.clone()
        small[0] = small[1] if s.num_timesteps > 1 else s.betas[0]
        if self.variance != "learned":
            large[0] = small[0]
        return fraction * gather(large.log(), t, like) + (1 - fraction) * gather(small.log(), t, like)

    def forward(self, x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """The training loss of each sample, [N]: the simple loss (equation 14) in the space of the prediction type.

        The squared error is averaged over pixels and channels, weighted by min-SNR if `min_snr_gamma` is set; a learned
        variance adds its bound (the hybrid loss).
        """
        x_t = self.q_sample(x_0, t, noise)
        output = self.run_network(x_t, t, y)
        signal, sigma = self._signal_and_sigma(t, x_0)
        target = {"epsilon": noise, "sample": x_0}.get(self.prediction_type)
        if target is None:
            target = signal * noise - sigma * x_0
        loss = (output[:, : x_0.shape[1]] - target).square().flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            loss = loss * self.loss_weights[t].to(loss.dtype)
        if self.variance == "learned":
            prediction = self.interpret(output, x_t, t, clip_denoised=False)
            mean = prediction._replace(x_0=prediction.x_0.detach())
            loss = loss + VLB_WEIGHT * self.schedule.num_timesteps * self._bound(x_0, x_t, t, mean)
        return loss

    def simple_loss(self, x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Equation 14 without weights, [N]: the squared error of the noise under any prediction type."""
        prediction = self.predict(self.q_sample(x_0, t, noise), t, clip_denoised=False, y=y)
        return (prediction.eps - noise).square().flatten(1).mean(1)

    def bound_term(
        self, x_0: Tensor, t: Tensor, noise: Tensor, clip_denoised: bool = True, y: Tensor | None = None
    ) -> Tensor:
        """One term of the bound at time step t, [N], in bits a dimension: L_{t-1}, or the decoder's L_0 at t = 0."""
        x_t = self.q_sample(x_0, t, noise)
        return self._bound(x_0, x_t, t, self.predict(x_t, t, clip_denoised, y))

    def _bound(self, x_0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        mean, _ = self.q_posterior(prediction.x_0, x_t, t)
        log_variance = self.log_variance(t, x_0, prediction.fraction)
        return bound.step_term(x_0, self.q_posterior(x_0, x_t, t), mean, log_variance)

    def _signal_and_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        s = self.schedule
        return gather(s.sqrt_alphas_cumprod, t, like), gather(s.sqrt_one_minus_alphas_cumprod, t, like)


def _run(network: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    output: Tensor = network(x_t, t) if y is None else network(x_t, t, y)
    return output.to(x_t.dtype)
