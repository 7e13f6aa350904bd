"""Samples beside their nearest training images, by pixel distance: does the model copy its data?

The search is exact, over every training image and, where training flips, its mirror image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modeling.inference.images import image_grid
from modeling.reliability.signals import poll

CHUNK = 4096  # training images at a time


class Neighbours(NamedTuple):
    """The nearest images of N queries."""

    images: Tensor  # uint8 [N, k, C, H, W], nearest first
    indices: Tensor  # int64 [N, k], into the images searched
    rms: Tensor  # float32 [N, k]: root mean square difference, in levels of 255

    def first(self, count: int) -> "Neighbours":
        """The neighbours of the first `count` queries."""
        return Neighbours(*(part[:count] for part in self))


@torch.no_grad()
def nearest_images(queries: Tensor, images: Tensor, k: int, mirror: bool) -> Neighbours:
    """The k nearest of `images`, uint8 [M, C, H, W] with M >= k, for each of `queries`, uint8 [N, C, H, W].

    `mirror` searches the mirror images too; an image counts once, in its nearer form.
    """
    flat = queries.flatten(1).float()
    best = torch.full((len(queries), k), torch.inf)
    best_code = torch.zeros((len(queries), k), dtype=torch.int64)  # 2 * index, + 1 for the mirror image
    for start in range(0, len(images), CHUNK):
        poll()
        part = images[start : start + CHUNK]
        codes = 2 * torch.arange(start, start + len(part))
        distance = _squared_distance(flat, part)
        code = codes.expand_as(distance)
        if mirror:
            mirrored = _squared_distance(flat, part.flip(3))
            code = torch.where(mirrored < distance, code + 1, code)
            distance = torch.minimum(distance, mirrored)
        best, order = torch.cat([best, distance], 1).topk(k, dim=1, largest=False)
        best_code = torch.cat([best_code, code], 1).gather(1, order)
    found = images[best_code // 2]
    found = torch.where((best_code % 2 == 1)[..., None, None, None], found.flip(4), found)
    rms = (found.float() - queries[:, None].float()).square().flatten(2).mean(2).sqrt()
    return Neighbours(found, best_code // 2, rms)


def _squared_distance(flat: Tensor, images: Tensor) -> Tensor:
    other = images.flatten(1).float()
    return flat.square().sum(1, keepdim=True) + other.square().sum(1) - 2 * flat @ other.T


def panel(queries: Tensor, neighbours: Neighbours) -> Tensor:
    """uint8 [H', W', C]: a row for each query, itself first, then its neighbours."""
    rows = torch.cat([queries[:, None], neighbours.images], 1)  # [N, 1 + k, C, H, W]
    return image_grid(rows.transpose(0, 1).flatten(0, 1), rows=len(queries))
