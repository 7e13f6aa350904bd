"""Data: any image source becomes one folder of uint8 arrays.

A prepared folder holds train.npy and test.npy (uint8 [N, H, W, C]), train_labels.npy and test_labels.npy (int64 [N]),
and data.json with counts, shape, class names and SHA-256 of each file. What training draws from them: batches.py. No
normalisation here: see images.py.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from modeling.errors import Stopped, UserError
from modeling.files import cannot_write, locked
from modeling.shapes import CLASSES, draw_shapes
from modeling.signals import poll, stopped_at_once

Uint8 = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Split = tuple[Uint8, Labels]


class LabelledImages(NamedTuple):
    """A split as the model sees it: uint8 [N, C, H, W] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def first(self, count: int | None) -> "LabelledImages":
        """The first `count`; None: all."""
        return LabelledImages(self.images[:count], self.labels[:count])


MAX_PIXELS = 1 << 24  # of one image, 4096 x 4096: a small file that unpacks to more is taken for an attack
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def cifar10(root: Path) -> tuple[Split, Split, list[str]]:
    """CIFAR-10 from `root`, downloaded there if it is missing; the files' MD5 are checked by torchvision.

    Raises:
        UserError: no complete copy and no network.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    def load(train: bool, download: bool) -> tuple[Split, list[str]]:
        dataset = CIFAR10(str(root), train=train, download=download)
        return (np.asarray(dataset.data), np.asarray(dataset.targets, np.int64)), list(dataset.classes)

    try:
        train, classes = load(True, False)
    except RuntimeError:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / ".lock", wait=True), stopped_at_once():  # one download, and one that can be stopped
                train, classes = load(True, True)
        except Stopped:
            raise
        except (OSError, RuntimeError, UserError) as error:
            files = {root / CIFAR10.base_folder / name: md5 for name, md5 in CIFAR10.train_list + CIFAR10.test_list}
            bad = [path.name for path, md5 in files.items() if path.exists() and not check_integrity(path, md5)]
            damaged = f" ({', '.join(bad)}: wrong MD5)" if bad else ""
            raise UserError(
                f"no complete CIFAR-10 in {root}{damaged}, and it could not be downloaded ({error}): set CIFAR10_ROOT "
                "to the folder that holds cifar-10-batches-py or cifar-10-python.tar.gz, or use data=shapes, which "
                "needs none"
            ) from None
    return train, load(False, False)[0], classes


def folder(path: Path, test_fraction: float) -> tuple[Split, Split, list[str]]:
    """A user's own images of one size; sub-folders, if any, are the classes.

    A share `test_fraction` of the images, chosen at random, is set aside for testing.

    Raises:
        UserError: no images, an unreadable file, mixed sizes, or too few images for both splits.
    """
    if not path.is_dir():
        raise UserError(f"data.path={path}: no such folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"no images in {path}: it must hold files that end in {', '.join(IMAGE_SUFFIXES)}")
    images = [_read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{file} is {image.shape[1]} x {image.shape[0]} pixels, {files[0]} is {images[0].shape[1]} x "
                f"{images[0].shape[0]}: all images must have one size"
            )
    classes = sorted({str(f.parent.relative_to(path)) for f in files})
    labels = np.array([classes.index(str(f.parent.relative_to(path))) for f in files], np.int64)
    order = np.random.default_rng(0).permutation(len(files))
    num_test = max(1, round(test_fraction * len(files)))
    if num_test >= len(files):
        raise UserError(f"{path} holds {len(files)} images: too few to set {num_test} aside for testing")
    stacked = np.stack(images)
    test, train = order[:num_test], order[num_test:]  # shuffled: the first test images are of all classes
    return (stacked[train], labels[train]), (stacked[test], labels[test]), classes


def _read_image(file: Path) -> Uint8:
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}") from None


def shapes(num_train: int, num_test: int, image_size: int, seed: int) -> tuple[Split, Split, list[str]]:
    """The embedded synthetic data set, see shapes.py."""
    return (
        draw_shapes(num_train, image_size, seed, split=0),
        draw_shapes(num_test, image_size, seed, split=1),
        list(CLASSES),
    )


def write_prepared(
    target: Path, train: Split, test: Split, classes: Sequence[str], source: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a prepared folder, whole or not at all, and returns what data.json holds. One process at a time.

    Args:
        target: the folder.
        train: images and labels to train on.
        test: never trained on.
        classes: names of the labels.
        source: the settings that it was made from.

    Raises:
        UserError: the folder cannot be written.
    """
    partial, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    try:
        for left in (partial, old):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        meta: dict[str, Any] = {"source": dict(source), "classes": list(classes), "shape": list(train[0].shape[1:])}
        meta["sha256"] = {}
        for name, (images, labels) in (("train", train), ("test", test)):
            meta[f"num_{name}"] = len(images)
            for stem, array in ((name, images), (f"{name}_labels", labels)):
                poll()
                np.save(partial / f"{stem}.npy", np.ascontiguousarray(array))
                meta["sha256"][stem] = _sha256(partial / f"{stem}.npy")
        (partial / "data.json").write_text(json.dumps(meta, indent=2) + "\n")
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
    return meta


def read_prepared(source: Path) -> dict[str, Any]:
    """What data.json of a prepared folder says.

    Raises:
        UserError: missing or damaged.
    """
    try:
        meta: dict[str, Any] = json.loads((source / "data.json").read_text())
        missing = {"classes", "shape", "sha256"} - {*meta}
        if missing:
            raise ValueError(f"data.json does not say {', '.join(sorted(missing))}")
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"no prepared data in {source} ({error}): run stage=prepare first") from None
    return meta


def load_split(source: Path, split: str) -> LabelledImages:
    """The images and labels of a prepared folder, verified by their SHA-256; the images are memory-mapped.

    Args:
        source: a prepared folder.
        split: "train" or "test".

    Returns:
        The images are a view of the file's [N, H, W, C].

    Raises:
        UserError: missing or damaged.
    """
    digests = read_prepared(source).get("sha256", {})

    def load(stem: str, mmap_mode: Literal["c"] | None) -> Tensor:
        path = source / f"{stem}.npy"
        try:
            if _sha256(path) != digests.get(stem):
                raise ValueError("its SHA-256 is not the one in data.json")
            return torch.from_numpy(np.load(path, mmap_mode))
        except (EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): run stage=prepare again") from None

    # "c" maps copy-on-write: the tensor may be written to, the file never is.
    return LabelledImages(load(split, "c").permute(0, 3, 1, 2), load(f"{split}_labels", None))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
