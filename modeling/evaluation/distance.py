"""The Frechet wavelet distance between samples and data: no trained network, no download, any images.

Veeramacheneni et al. 2025 (https://arxiv.org/abs/2312.15289): the packets of a Haar wavelet packet transform are
compared as FID compares features, each by the Frechet distance of two normal distributions, and averaged. Two choices:
the depth of the transform follows from the size of the images, so that a packet has at most PACKET x PACKET
coefficients a channel and a thousand samples are enough for its covariance; and log(1 + |w|) is compared in place of
each coefficient w, since without it noise with the covariance of the images is as near to them as other images are
(docs/fidelity.md has the table). Numbers of another depth, or of another number of samples, cannot be compared.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.reliability.signals import poll

PACKET = 4  # the largest height and width of a packet
GROUPS = 20  # of the jackknife
BATCH = 1000 * 3 * 32 * 32  # values of images at a time
FEWEST = 4  # images: each half has a covariance
# Sum and differences along rows, columns and diagonals of 2 x 2 pixels, orthonormal.
HAAR = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2


class Normal(NamedTuple):
    """Mean and covariance of each packet."""

    mean: Tensor  # float64 [P, D]
    covariance: Tensor  # float64 [P, D, D]


@dataclass
class Sums:
    """What mean and covariance follow from, so that parts can be added and taken away."""

    images: int
    first: Tensor  # float64 [P, D]
    second: Tensor  # float64 [P, D, D]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.images + other.images, self.first + other.first, self.second + other.second)

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(self.images - other.images, self.first - other.first, self.second - other.second)

    def normal(self) -> Normal:
        mean = self.first / self.images
        outer = mean[:, :, None] * mean[:, None, :]
        return Normal(mean, (self.second - self.images * outer) / (self.images - 1))


def wavelet_packets(images: Tensor) -> Tensor:
    """The packets of images, uint8 [N, C, H, W], black 0 and white 1: float64 [N, P, D], P a power of 4.

    Height and width are filled up with their last row and column to what the transform divides.
    """
    depth = max(0, math.ceil(math.log2(max(images.shape[2:]) / PACKET)))
    bottom, right = (-size % 2**depth for size in images.shape[2:])
    x = F.pad(images.double() / 255, (0, right, 0, bottom), mode="replicate")[:, None]  # [N, P, C, H, W]
    for _ in range(depth):
        squares = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)
        x = (squares @ HAAR).permute(0, 1, 5, 2, 3, 4).flatten(1, 2)
    return x.flatten(2)


def packet_sums(images: Tensor) -> Sums:
    """The sums over all images, uint8 [N, C, H, W], of log(1 + |w|) of their packets."""

    def part(images: Tensor) -> Sums:
        poll()
        packets = wavelet_packets(images).abs().log1p().transpose(0, 1)  # [P, N, D]
        return Sums(packets.shape[1], packets.sum(1), packets.mT @ packets)

    channels, side = images.shape[1], max(images.shape[2:])
    batch = max(1, BATCH // (channels * side * side))  # filled up, an image is at most a square
    return reduce(add, (part(images[k : k + batch]) for k in range(0, len(images), batch)))


def frechet_distances(a: Normal, b: Normal) -> Tensor:
    """The squared Frechet distance of each packet, float64 [P] (Dowson and Landau 1982)."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT
    # The trace of the root of a product is that of a symmetric matrix with the same eigenvalues.
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum(1)
    traces = (a.covariance + b.covariance).diagonal(dim1=1, dim2=2).sum(1)
    distances: Tensor = (a.mean - b.mean).square().sum(1) + traces - 2 * overlap
    return distances


def wavelet_distance(images: Tensor, reference: Normal) -> tuple[float, float]:
    """The distance of samples, uint8 [N, C, H, W], and its standard error; NaN if they or the reference are too few.

    The error is the jackknife's over GROUPS of the samples, without that of the reference. It is too large, by about
    half, for images that are as near as the data itself, whose distance is the bias of few samples alone.
    """
    if len(images) < FEWEST or not bool(reference.covariance.isfinite().all()):
        return math.nan, math.nan
    # The sums of a group again, since those of all groups together are gigabytes for large images.
    parts = map(packet_sums, images.chunk(min(GROUPS, len(images) // 2)))
    return jackknifed(packet_sums(images), parts, reference)


def jackknifed(total: Sums, groups: Iterable[Sums], reference: Normal) -> tuple[float, float]:
    """The mean distance over the packets, and its standard error from leaving out each group of the total in turn."""
    without = torch.stack([frechet_distances((total - group).normal(), reference).mean() for group in groups])
    error = ((len(without) - 1) * without.var(correction=0)).sqrt().item()
    return frechet_distances(total.normal(), reference).mean().item(), error
