"""Samples beside their nearest training images, by pixel distance: does the model copy its data?

The search is exact, over every training image and, where training flips, its mirror image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modeling.reliability.signals import poll
from modeling.reliability.terminal import counted

CHUNK = 4096 * 3 * 32 * 32  # values of training images at a time


class Neighbours(NamedTuple):
    images: Tensor  # uint8 [N, k, C, H, W], nearest first
    indices: Tensor  # int64 [N, k], into the images searched
    rms: Tensor  # float32 [N, k]: root mean square difference, in levels of 255


@torch.no_grad()
def nearest_images(queries: Tensor, images: Tensor, k: int, mirror: bool) -> Neighbours:
    """The k nearest of `images`, uint8 [M, C, H, W] with M >= k, for each of `queries`, uint8 [N, C, H, W].

    `mirror` searches the mirror images too; an image counts once, in its nearer form.
    """
    flat = queries.flatten(1).double()  # exact: the sums of squares of bytes are whole numbers
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    indices = torch.zeros((len(queries), k), dtype=torch.int64)
    chunk = max(1, CHUNK // flat.shape[1])
    for start in counted("nearest training images", range(0, len(images), chunk), "parts"):
        poll()
        part = images[start : start + chunk]
        distance = _squared_distance(flat, part)
        if mirror:
            distance = torch.minimum(distance, _squared_distance(flat, part.flip(3)))
        best, order = torch.cat([best, distance], 1).topk(k, dim=1, largest=False)
        these = torch.arange(start, start + len(part)).expand_as(distance)
        indices = torch.cat([indices, these], 1).gather(1, order)
    found = images[indices]
    forms = torch.stack([found, found.flip(4)] if mirror else [found])
    rms, form = (forms.float() - queries[:, None].float()).square().flatten(3).mean(3).sqrt().min(0)  # [N, k]
    return Neighbours(torch.where(form[..., None, None, None] == 1, found.flip(4), found), indices, rms)


def _squared_distance(flat: Tensor, images: Tensor) -> Tensor:
    other = images.flatten(1).double()
    return flat.square().sum(1, keepdim=True) + other.square().sum(1) - 2 * flat @ other.T
