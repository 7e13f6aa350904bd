"""Data sources: CIFAR-10, a folder of a user's own images, and the embedded shapes.

Each returns the training and the test split as uint8 [N, H, W, C] and int64 labels [N], and the names of the classes.
To add a source: docs/extending.md.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from modeling.data.shapes import CLASSES, Split, draw_shapes
from modeling.reliability.errors import Stopped, UserError, require, short
from modeling.reliability.files import existing, locked, places, state_root
from modeling.reliability.signals import poll, stopped_at_once

Source = tuple[Split, Split, Sequence[str]]

MAX_PIXELS = 1 << 24  # of one image, 4096 x 4096: a small file that unpacks to more is taken for an attack
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def cifar10() -> Source:
    """CIFAR-10 from $CIFAR10_ROOT or data/raw, downloaded if it is missing; torchvision checks the MD5 of the files."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    named = places(os.environ["CIFAR10_ROOT"]) if os.environ.get("CIFAR10_ROOT") else []
    root = next((path for path in named if path.exists()), [state_root() / "data" / "raw", *named][-1])

    def load(download: bool) -> Source:
        train, test = (CIFAR10(str(root), train=train, download=download) for train in (True, False))
        splits = [(np.asarray(split.data), np.asarray(split.targets, np.int64)) for split in (train, test)]
        return splits[0], splits[1], list(train.classes)

    with suppress(RuntimeError):  # not found, or damaged
        return load(download=False)
    try:
        with locked(root / ".lock", wait=True), stopped_at_once():
            return load(download=True)
    except Stopped:
        raise
    except (OSError, RuntimeError, UserError) as error:
        files = {root / CIFAR10.base_folder / name: md5 for name, md5 in CIFAR10.train_list + CIFAR10.test_list}
        bad = [path.name for path, md5 in files.items() if path.exists() and not check_integrity(path, md5)]
        damaged = f" ({', '.join(bad)}: wrong MD5)" if bad else ""
        raise UserError(
            f"no complete CIFAR-10 in {root}{damaged}, and it could not be downloaded ({error}): set CIFAR10_ROOT to "
            "the folder that holds cifar-10-batches-py or cifar-10-python.tar.gz, or use data=shapes, which needs none"
        ) from None


def folder(path: str, test_fraction: float) -> Source:
    """A user's own images of one size; sub-folders, if any, are the classes; `test_fraction` is drawn for testing."""
    root = existing("data.path", path)
    require(root.is_dir(), "data.path", path, "must be a folder")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"no images in {path}: it must hold files that end in {', '.join(IMAGE_SUFFIXES)}")
    num_test = max(1, round(test_fraction * len(files)))
    if num_test >= len(files):
        raise UserError(f"{path} holds {len(files)} images: too few to set {num_test} aside for testing")
    images = [_read_image(file) for file in files]
    sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in images]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"{file} is {size} pixels, {files[0]} is {sizes[0]}: all images must have one size")
    names = [str(file.parent.relative_to(root)) for file in files]
    classes, labels = np.unique(names, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(files))  # so that the first test images are of all classes
    test, train = order[:num_test], order[num_test:]
    stacked = np.stack(images)
    return (stacked[train], labels[train]), (stacked[test], labels[test]), classes.tolist()


def _read_image(file: Path) -> npt.NDArray[np.uint8]:
    poll()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about the files
            with Image.open(file) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"it has {width} x {height} pixels, allowed are {MAX_PIXELS} in all")
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # what a decoder of hostile bytes raises is a long list, and none of it is our bug
        raise UserError(f"{file} cannot be read as an image: {short(error)}") from None


def shapes(num_train: int, num_test: int, image_size: int, seed: int) -> Source:
    """The embedded synthetic data set, see shapes.py."""
    return draw_shapes(num_train, image_size, seed, split=0), draw_shapes(num_test, image_size, seed, split=1), CLASSES


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Shape (H, W, C) and classes, where they are known before the images are there; keywords as in SOURCES.
FORMS: dict[str, Callable[..., tuple[list[int], Sequence[str]]]] = {
    "cifar10": lambda: ([32, 32, 3], CIFAR10_CLASSES),
    "shapes": lambda image_size, **_: ([image_size, image_size, 3], CLASSES),
}
# By the name in the configuration; a source's own keys are its keywords.
SOURCES: dict[str, Callable[..., Source]] = {"cifar10": cifar10, "folder": folder, "shapes": shapes}
