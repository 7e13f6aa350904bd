"""The diffusion model: the forward process q, its posterior, the network's prediction and the training loss.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239), equations 4 to 7, 12, 14 and 15. Images are [N, C, H, W] in [-1, 1];
`t` is [N] int64 in [0, T), 0-based. No randomness: whoever calls passes the noise and the time steps. The terms of the
variational bound are in likelihood.py, the samplers in sampling.py.
"""

from typing import NamedTuple

from torch import Tensor, nn

from modeling.schedule import NoiseSchedule, gather

PREDICTION_TYPES = ("epsilon",)
VARIANCES = ("fixed_small", "fixed_large")


class Prediction(NamedTuple):
    """What the network says of x_t: the clean image and the noise in it, both [N, C, H, W]."""

    x_0: Tensor
    eps: Tensor


class DiffusionModel(nn.Module):
    """A network under a noise schedule.

    Args:
        network: maps (x_t [N, C, H, W], t [N]) to a prediction of the noise, [N, C, H, W].
        schedule: the constants of the forward process.
        prediction_type: what the network predicts; one of PREDICTION_TYPES.
        variance: of the reverse steps; "fixed_large" is beta_t, "fixed_small" the variance of the posterior.

    Raises:
        ValueError: unknown prediction_type or variance.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        variance: str = "fixed_large",
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}")
        if variance not in VARIANCES:
            raise ValueError(f"variance {variance!r} is none of {', '.join(VARIANCES)}")
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.variance = variance

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0), equation 4: sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise.

        Args:
            x_0: [N, C, H, W] in [-1, 1].
            t: [N].
            noise: [N, C, H, W], from N(0, I).
        """
        s = self.schedule
        return gather(s.sqrt_alphas_cumprod, t, x_0) * x_0 + gather(s.sqrt_one_minus_alphas_cumprod, t, x_0) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, C, H, W] and variance [N, 1, 1, 1] of q(x_{t-1} | x_t, x_0), equation 7."""
        s = self.schedule
        mean = gather(s.posterior_mean_coef1, t, x_t) * x_0 + gather(s.posterior_mean_coef2, t, x_t) * x_t
        return mean, gather(s.posterior_variance, t, x_t)

    def reverse_variance(self, t: Tensor, like: Tensor) -> Tensor:
        """Variance of the reverse step p(x_{t-1} | x_t) over all T steps, [N, 1, 1, 1] in the dtype of `like`.

        At t = 0 it is that of the decoder: the posterior's at t = 1, since its own is 0 (as in Ho et al.'s code).
        """
        s = self.schedule
        table = (s.betas if self.variance == "fixed_large" else s.posterior_variance).clone()
        table[0] = s.posterior_variance[1] if s.num_timesteps > 1 else s.betas[0]
        return gather(table, t, like)

    def predict(self, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Prediction:
        """The network's estimate of the clean image and of the noise.

        Args:
            x_t: [N, C, H, W].
            t: [N].
            clip_denoised: clip x_0 to [-1, 1], the range of the data; eps is then the noise that fits the clipped x_0.
        """
        s = self.schedule
        signal = gather(s.sqrt_alphas_cumprod, t, x_t)
        sigma = gather(s.sqrt_one_minus_alphas_cumprod, t, x_t)
        eps: Tensor = self.network(x_t, t).to(x_t.dtype)
        x_0 = (x_t - sigma * eps) / signal
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
            eps = (x_t - signal * x_0) / sigma
        return Prediction(x_0, eps)

    def forward(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The simple loss, equation 14, of each sample.

        Args:
            x_0: [N, C, H, W] in [-1, 1].
            t: [N].
            noise: [N, C, H, W], from N(0, I).

        Returns:
            [N] in the dtype of x_0: squared error of the predicted noise, averaged over pixels and channels.
        """
        eps: Tensor = self.network(self.q_sample(x_0, t, noise), t)
        return (eps.to(noise.dtype) - noise).square().flatten(1).mean(dim=1)
