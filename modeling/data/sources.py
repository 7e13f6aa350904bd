"""Data sources by the name in the configuration, and the forms of their images.

Each returns the training split, the test split and the names of the classes, see splits.py. To add a source:
docs/extending.md.
"""

from collections.abc import Callable, Sequence
from functools import partial

from modeling.data.folder import folder, folder_form
from modeling.data.published import SETS, padded, published
from modeling.data.shapes import CLASSES, draw_shapes
from modeling.data.splits import Source

cifar10 = partial(published, "cifar10")


def shapes(num_train: int, num_test: int, image_size: int, seed: int) -> Source:
    """The embedded synthetic data set, see shapes.py."""
    return draw_shapes(num_train, image_size, seed, split=0), draw_shapes(num_test, image_size, seed, split=1), CLASSES


def _published_form(name: str, image_size: int = 0) -> tuple[list[int], Sequence[str]]:
    height, width, channels = SETS[name].shape
    return [image_size or height, image_size or width, channels], SETS[name].classes


# Shape (H, W, C) and classes, where they are known before the images are prepared; keywords as in SOURCES.
FORMS: dict[str, Callable[..., tuple[list[int], Sequence[str]]]] = {
    **{name: partial(_published_form, name) for name in SETS},
    "folder": folder_form,
    "shapes": lambda image_size, **_: ([image_size, image_size, 3], CLASSES),
}
# A source's own keys are its keywords.
SOURCES: dict[str, Callable[..., Source]] = {
    "cifar10": cifar10,
    "cifar100": partial(published, "cifar100"),
    "fashion_mnist": partial(padded, "fashion_mnist"),
    "folder": folder,
    "mnist": partial(padded, "mnist"),
    "shapes": shapes,
    "svhn": partial(published, "svhn"),
}
