"""A trained model from Python, four pictures: python -m examples.from_python models/model.safetensors pictures"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from modeling import TrainedModel, load_model
from modeling.diffusion.model import Prediction
from modeling.diffusion.samplers import ddpm_sample, timestep_subsequence
from modeling.inference.images import image_grid, save_png, to_model, to_uint8
from modeling.inference.samples import SampleNoise


def interpolate(model: TrainedModel, frames: int, label: str | None) -> Tensor:
    """From the image of one noise to that of another: uint8 [frames, C, H, W]."""
    first, last = model.noise(2, seed=1)
    angle = torch.linspace(0, math.pi / 2, frames, device=first.device).reshape(-1, 1, 1, 1)
    # On the arc each x_T is from N(0, I) too, which it is not on the straight line.
    return model.sample(noise=angle.cos() * first + angle.sin() * last, label=label)


def inpaint(model: TrainedModel, image: Tensor, known: Tensor, count: int, label: str | None) -> Tensor:
    """`count` ways to go on from the known part of an image, uint8 [count, C, H, W].

    In every reverse step the predicted x_0 is replaced by the image where that is known: there x_t is then drawn from
    q(x_t | image), and the network fits the rest to it; in a few of ten images it does not.

    Args:
        image: uint8 [C, H, W].
        known: bool [H, W].
    """
    noise = SampleNoise(0, range(count), model.image_shape, model.compute.device)
    x_T = noise()
    clean, known = to_model(image).to(x_T.device), known.to(x_T.device)

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = model.predict(x_t, t, label)
        return prediction._replace(x_0=torch.where(known, clean, prediction.x_0))

    timesteps = timestep_subsequence(model.alphas_cumprod, min(100, len(model.alphas_cumprod)))
    return to_uint8(ddpm_sample(predict, x_T, timesteps, model.alphas_cumprod, noise)).cpu()


def main(path: str, folder: str) -> None:
    """Writes samples.png, one-class.png, interpolation.png and inpainting.png."""
    model = load_model(path)
    label = model.classes[-1] if model.classes else None
    samples = model.sample(len(model.classes) or 10, seed=0)  # by the sampler of the model's recipe
    left = torch.zeros(model.image_shape[1:], dtype=torch.bool)
    left[:, : left.shape[1] // 2] = True
    covered = torch.where(left, samples[-1], torch.tensor(127, dtype=torch.uint8))
    filled = inpaint(model, samples[-1], left, 8, label)
    pictures = {
        "samples": samples,
        "one-class": model.sample(10, seed=1, label=label),
        "interpolation": interpolate(model, 10, label),
        "inpainting": torch.cat([samples[-1:], covered[None], filled]),  # the image, what is known, and eight ways on
    }
    for name, images in pictures.items():
        save_png(Path(folder) / f"{name}.png", image_grid(images, rows=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
