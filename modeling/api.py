"""From Python: a trained model in a notebook, with the bits of the command line.

Every tensor of images is [N, C, H, W] and every shape (C, H, W): uint8, 0 to 255, as pictures; float32 in [-1, 1] as
the network sees them. Files alone (PNG, prepared data, metadata of a model) are [H, W, C].

>>> from modeling import load_model
>>> model = load_model("models/model.safetensors")
>>> images = model.sample(16, seed=0)
>>> images.shape == (16, *model.image_shape), images.dtype
(True, torch.uint8)
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from torch import Tensor

from modeling.checkpoints.model_file import load_trained
from modeling.config import load_config
from modeling.diffusion.model import DiffusionModel, Prediction
from modeling.inference.device import Compute, choose_compute
from modeling.inference.images import to_uint8
from modeling.inference.samples import SampleNoise, denoise
from modeling.recipe import conf_dir, in_grammar
from modeling.reliability.errors import ConfigError, require
from modeling.settings.groups import GROUPS, Config
from modeling.stages.sample import as_recipe, check_sampling, draw_configured


def load_model(
    path: str | Path = "models/model.safetensors", device: str = "auto", precision: str = "auto"
) -> "TrainedModel":
    """The model of a file that training has written, of a folder in runs/ (its newest checkpoint), or of diffusers.

    Args:
        device: auto (CUDA, or else the CPU), cpu, cuda or mps.
        precision: auto (bf16 autocast where the device has it), bf16 or fp32.

    Raises:
        UserError: there is no such model or device, or the file is damaged; its message is one line.
    """
    return TrainedModel(*load_trained(Path(path)), choose_compute(device, precision))


class TrainedModel:
    """What load_model returns.

    Attributes:
        diffusion: the DiffusionModel, in eval mode on the device; use it under `compute.autocast()`.
        meta: the metadata of the file: the recipe (`config`), `steps`, `sha256` of the weights.
        image_shape: (C, H, W).
        classes: the names of the classes of a class-conditional model, else none.
        alphas_cumprod: of its noise schedule, float64 [T] on the CPU.
    """

    def __init__(self, diffusion: DiffusionModel, meta: dict[str, Any], compute: Compute) -> None:
        self.meta = meta
        self.compute = compute
        self.diffusion = compute.place_model(diffusion)
        self.image_shape: tuple[int, ...] = tuple(meta["image_shape"])
        self.classes: list[str] = list(meta["classes"]) if diffusion.num_classes else []
        self.alphas_cumprod: Tensor = diffusion.schedule.table()

    def sample(
        self,
        count: int = 16,
        *,
        seed: int = 0,
        label: str | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        noise: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Images, uint8 [N, C, H, W] on the CPU.

        Without `noise` they are the bits of `python main.py stage=sample` with the same settings, on the same device.

        Args:
            seed: image k is a function of (seed, k).
            label: a class of `classes`; None: image k is of class k modulo their number.
            guidance_scale: of a class-conditional model; 1: none; None: that of the recipe, or 1 with `sampler`.
            sampler: ddpm, ddim, dpm_solver or unipc; None: that of the model's recipe, with its options.
            noise: x_T, [N, C, H, W], in place of noise(count, seed); N is then the count. Later noise is of `seed`.
            options: more keys of conf/sampler: steps, spacing, eta, autoguidance_scale, clip_denoised, batch_size.

        Raises:
            ConfigError: the model cannot be sampled from like this; its message names the key and what is allowed.
        """
        options |= {"seed": seed, "label": label}
        if guidance_scale is not None:
            options["guidance_scale"] = guidance_scale
        config = self._config(sampler, options)
        if noise is None:
            return draw_configured(config, self.diffusion, self.meta, range(count), self.compute)
        shown = f"[N, {', '.join(map(str, self.image_shape))}] is needed"
        require(noise.shape[1:] == self.image_shape, "noise", [*noise.shape], shown)
        fresh = SampleNoise(seed, range(len(noise)), self.image_shape, self.compute.device)
        fresh()  # the x_T that `noise` replaces
        x_T = noise.to(self.compute.device, torch.float32)
        draws = itertools.chain([x_T], (fresh() for _ in itertools.count()))
        y = self._labels(range(len(noise)) if label is None else [self.classes.index(label)] * len(noise))
        return to_uint8(denoise(self.diffusion, config.sampler, partial(next, draws), y, self.compute)).cpu()

    def noise(self, count: int = 16, seed: int = 0) -> Tensor:
        """x_T from N(0, I), float32 [N, C, H, W] on the device: what sample() starts from."""
        return SampleNoise(seed, range(count), self.image_shape, self.compute.device)()

    @torch.no_grad()
    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        label: str | None = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
    ) -> Prediction:
        """The network's estimate of the clean images and of the noise, for samplers of your own.

        Args:
            x_t: float32 [N, C, H, W] on the device.
            t: int64 [N], in [0, T).
            label: the class of all images; None: without a label.
            guidance_scale: of classifier-free guidance; 1: none.
            autoguidance_scale: of guidance by the model's guide; 1: none.
        """
        require(label is None or label in self.classes, "label", label, f"allowed are {', '.join(self.classes)}")
        possible = autoguidance_scale == 1 or self.diffusion.guide is not None
        require(possible, "autoguidance_scale", autoguidance_scale, "the model has no guide")
        index = len(self.classes) if label is None else self.classes.index(label)
        y = self._labels([index] * len(x_t), len(self.classes) + 1)
        with self.compute.autocast():
            return self.diffusion.predict(x_t, t, True, y, guidance_scale, autoguidance_scale)

    def _labels(self, indices: Sequence[int], count: int = 0) -> Tensor | None:
        """Labels [N] on the device, each modulo `count` (0: the number of classes); None of a model without classes."""
        count = count or len(self.classes)
        return torch.tensor(indices, device=self.compute.device) % count if self.classes else None

    def _config(self, sampler: str | None, options: dict[str, Any]) -> Config:
        """The configuration of `python main.py stage=sample` with these keys of the sampler group."""
        for key in ("num_samples", "compile"):
            if key in options:
                raise ConfigError(f"sampler.{key}: not from Python; count is the number of images")
        choices = GROUPS["sampler"].choices
        require(sampler is None or sampler in choices, "sampler", sampler, f"allowed are {', '.join(choices)}")
        typed = [] if sampler is None else [f"sampler={sampler}"]
        typed += [f"++sampler.{key}={in_grammar(value)}" for key, value in options.items()]  # ++: load_config refuses
        with conf_dir():
            config = as_recipe(load_config(compose("config", typed), typed), self.meta)
        check_sampling(config, self.diffusion, self.meta)
        return config
