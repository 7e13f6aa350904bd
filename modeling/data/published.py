"""Published data sets: torchvision downloads and reads them, and checks the MD5 of what it downloads."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modeling.data.splits import Arrays
from modeling.reliability.errors import Stopped, UserError, out_of_memory, short
from modeling.reliability.files import locked, places, state_root
from modeling.reliability.signals import stopped_at_once

Loaded = tuple[Arrays, Arrays, Sequence[str]]  # a Source whose splits are in the memory
DIGITS = [*"0123456789"]
FINE_LABELS = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard "
    "lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
    "pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark "
    "shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone "
    "television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)


class Published(NamedTuple):
    title: str
    dataset: str  # torchvision's class
    shape: list[int]  # (H, W, C)
    classes: list[str]
    files: str  # what its folder holds


SETS = {
    "cifar10": Published(
        "CIFAR-10",
        "CIFAR10",
        [32, 32, 3],
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        "cifar-10-batches-py or cifar-10-python.tar.gz",
    ),
    "cifar100": Published(
        "CIFAR-100",
        "CIFAR100",
        [32, 32, 3],
        FINE_LABELS.split(),
        "cifar-100-python or cifar-100-python.tar.gz",
    ),
    "svhn": Published("SVHN", "SVHN", [32, 32, 3], DIGITS, "train_32x32.mat and test_32x32.mat"),
    "mnist": Published("MNIST", "MNIST", [28, 28, 1], DIGITS, "MNIST/raw with its four .gz files"),
    "fashion_mnist": Published(
        "Fashion-MNIST",
        "FashionMNIST",
        [28, 28, 1],
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
        "FashionMNIST/raw with its four .gz files",
    ),
}


def published(name: str) -> Loaded:
    """A data set of SETS from $<NAME>_ROOT or data/raw, downloaded if it is missing; UserError if it is damaged."""
    import torchvision.datasets  # here, since the other sources need not wait for it

    about, variable = SETS[name], f"{name.upper()}_ROOT"
    dataset = getattr(torchvision.datasets, about.dataset)
    named = places(os.environ[variable]) if os.environ.get(variable) else []
    root = next((path for path in named if path.exists()), [state_root() / "data" / "raw", *named][-1])

    def load(download: bool) -> Loaded:
        # torchvision names the splits in two ways.
        splits = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
        train, test = (dataset(str(root), download=download, **split) for split in splits)
        return _arrays(train), _arrays(test), train.classes if name.startswith("cifar") else about.classes

    with suppress(Exception):  # not found, or damaged
        return load(download=False)
    try:
        with locked(root / ".lock", wait=True), stopped_at_once():
            return load(download=True)
    except Stopped:
        raise
    except Exception as error:  # what a damaged file leads to is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        bad = ", ".join(_damaged(dataset, root))
        found = f"no complete {about.title} in {root}{f' ({bad}: wrong MD5)' if bad else ''}"
        raise UserError(
            f"{found}, and it could not be downloaded ({short(error)}): set {variable} to the folder that holds "
            f"{about.files}, or use data=shapes, which needs none"
        ) from None


def padded(name: str, image_size: int) -> Loaded:
    """Grey images of `image_size` pixels: those of a data set, with a black border around each."""
    (train, labels), (test, test_labels), classes = published(name)
    border = (image_size - SETS[name].shape[0]) // 2
    around = ((0, 0), (border, border), (border, border), (0, 0))
    return (np.pad(train, around), labels), (np.pad(test, around), test_labels), classes


def _arrays(split: Any) -> Arrays:
    images = np.asarray(split.data)
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[1] == 3:  # [N, C, H, W]
        images = images.transpose(0, 2, 3, 1)
    return images, np.asarray(split.targets if hasattr(split, "targets") else split.labels, np.int64)


def _damaged(dataset: Any, root: Path) -> Iterator[str]:
    """The files that are there with another MD5 than torchvision's."""
    from torchvision.datasets.utils import check_integrity

    if hasattr(dataset, "split_list"):
        files = [(root / name, md5) for _, name, md5 in dataset.split_list.values()]
    elif hasattr(dataset, "train_list"):
        files = [(root / dataset.base_folder / name, md5) for name, md5 in dataset.train_list + dataset.test_list]
    else:
        files = [(root / dataset.__name__ / "raw" / name, md5) for name, md5 in dataset.resources]
    yield from (path.name for path, md5 in files if path.exists() and not check_integrity(path, md5))
