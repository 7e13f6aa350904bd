"""`shapes`: an embedded, synthetic data set of ten coloured shapes, drawn from a seed; it needs no download.

Image k depends on (seed, split, k) alone. Shapes are anti-aliased regions given by signed distance functions on a
dark background; each class has its own colour, and position, size and brightness vary.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from modeling.data.splits import Arrays
from modeling.reliability.signals import poll

Array = npt.NDArray[np.float64]


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _plus(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 1.0, 0.28), _box(x, y, 0.28, 1.0))


# RGB, and the signed distance, negative inside; x and y in units of the shape's radius, y downwards.
SHAPES: dict[str, tuple[tuple[float, float, float], Callable[[Array, Array], Array]]] = {
    "circle": ((0.95, 0.20, 0.20), lambda x, y: np.hypot(x, y) - 1),
    "square": ((0.20, 0.45, 0.95), lambda x, y: _box(x, y, 0.85, 0.85)),
    "triangle": ((0.20, 0.80, 0.30), lambda x, y: np.maximum(y - 0.75, 0.87 * np.abs(x) - 0.5 * y - 0.5)),
    "ring": ((0.95, 0.85, 0.15), lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.22),
    "plus": ((0.80, 0.30, 0.90), _plus),
    "diamond": ((0.15, 0.85, 0.85), lambda x, y: (np.abs(x) + np.abs(y) - 1.1) / np.sqrt(2)),
    "frame": ((0.95, 0.55, 0.10), lambda x, y: np.abs(_box(x, y, 0.7, 0.7)) - 0.18),
    "cross": ((0.95, 0.55, 0.75), lambda x, y: _plus((x + y) / np.sqrt(2), (x - y) / np.sqrt(2))),
    "moon": ((0.92, 0.92, 0.92), lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.45, y + 0.2))),
    "bars": ((0.60, 0.42, 0.25), lambda x, y: np.minimum(_box(x, y - 0.6, 1.0, 0.27), _box(x, y + 0.6, 1.0, 0.27))),
}
CLASSES = tuple(SHAPES)
RADII = (0.22, 0.36)  # of the image's size


def coverage(name: str, image_size: int, radius: float, centre_x: float, centre_y: float) -> Array:
    """The share of each pixel that a shape covers, [image_size, image_size]; lengths in pixels."""
    pixels = np.arange(image_size) + 0.5
    x, y = np.meshgrid((pixels - centre_x) / radius, (pixels - centre_y) / radius)
    distance = SHAPES[name][1](x, y) * radius
    return np.clip(0.5 - distance, 0, 1)


def draw_shapes(count: int, image_size: int, seed: int, split: int) -> Arrays:
    """`count` images, the classes in turn; `split` is 0 for training and 1 for testing: they share no random number."""
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    for k in range(count):
        poll()
        rng = np.random.default_rng([seed, split, k])
        radius = image_size * rng.uniform(*RADII)
        centre = rng.uniform(radius + 1, image_size - radius - 1, 2)
        name = CLASSES[labels[k]]
        covered = coverage(name, image_size, radius, *centre)[..., None]
        colour = np.array(SHAPES[name][0]) * rng.uniform(0.85, 1.0)
        background = rng.uniform(0.05, 0.15)
        images[k] = np.round(255 * (covered * colour + (1 - covered) * background))
    return images, labels
