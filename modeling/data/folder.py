"""From a folder to images with classes and a split: which files count, and what they are.

Sub-folders are classes. `train` beside `test` or `val` is the split; else a part of the images is drawn for testing.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modeling.data.pictures import Rule, suffixes
from modeling.data.reading import Reader
from modeling.data.splits import Source
from modeling.reliability.errors import UserError, require
from modeling.reliability.files import existing
from modeling.reliability.signals import poll
from modeling.reliability.terminal import counts

log = logging.getLogger(__name__)
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first of them that is there


class Images(NamedTuple):
    """The image files of a folder, relative to it, each with its class."""

    root: Path
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    passed_over: Counter[str]


def folder(path: str, test_fraction: float, skip_unreadable: bool, **rule: Any) -> Source:
    """A user's own images, made one as pictures.Rule says; UserError for what cannot be read or does not fit."""
    images = find_images(path, test_fraction)
    if images.passed_over:
        log.info("passed over in %s: %s", path, counts(images.passed_over))
    reader = Reader(images.root, Rule(**rule), skip_unreadable)
    return partial(reader.parts, images.train), partial(reader.parts, images.test), images.classes


def folder_form(path: str, test_fraction: float, skip_unreadable: bool, **rule: Any) -> tuple[list[int], list[str]]:
    """The shape (H, W, C) of the images, as the first of them shows it, and the classes."""
    images = find_images(path, test_fraction)
    reader = Reader(images.root, Rule(**rule), skip_unreadable)
    pixels, _ = next(reader.parts(images.train, 1, Counter()), (None, None))
    if pixels is None:
        raise UserError(f"no image of {path} can be read")
    return list(pixels.shape[1:]), images.classes


def walk(root: Path, passed_over: Counter[str]) -> Iterator[str]:
    """All files below a folder, relative to it, but hidden ones. Links are followed, and no folder is read twice."""
    seen = {_identity(root)}

    def is_new(path: str) -> bool:
        known = (identity := _identity(path)) in seen
        seen.add(identity)
        if known:
            passed_over["links to folders that are read anyway"] += 1
        return not known

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    for inner, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        poll()
        visible = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        folders[:] = [name for name in visible if is_new(os.path.join(inner, name))]
        here = os.path.relpath(inner, root)
        yield from (os.path.normpath(os.path.join(here, name)) for name in sorted(names) if not name.startswith("."))


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def listing(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of a file, or of every file that `walk` finds in a folder."""
    found = []
    for name in sorted(walk(path, Counter())) if path.is_dir() else ("",):
        file = path / name
        state = file.stat() if file.exists() else file.lstat()  # of a link that leads nowhere
        found.append((name, state.st_size, state.st_mtime_ns))
    return found


def find_images(path: str, test_fraction: float) -> Images:
    """The images of a folder, mixed in an order that is the same everywhere; UserError if they are too few."""
    root = existing("data.path", path)
    require(root.is_dir(), "data.path", path, "must be a folder")
    passed_over: Counter[str] = Counter()
    files = []
    for name in walk(root, passed_over):
        ending = os.path.splitext(name)[1].lower()
        if ending in suffixes():
            files.append(name)
        else:
            passed_over[ending or "without an ending"] += 1
    if not files:
        instead = f", and not only {counts(passed_over)}" if passed_over else ""
        raise UserError(f"no images in {path}: it must hold files that end in {', '.join(sorted(suffixes()))}{instead}")
    files.sort(key=lambda name: name.split(os.sep))
    mixed = [files[k] for k in np.random.default_rng(0).permutation(len(files))]  # the first are of all classes
    inner = _below_what_they_share([os.path.dirname(name) for name in mixed])
    tops = [name.partition(os.sep)[0].lower() for name in inner]
    held_out = next((name for name in TEST if name in tops), None)
    if held_out and not set(TRAIN).isdisjoint(tops):
        classes_of = [name.partition(os.sep)[2] or "." for name in inner]
        named = list(zip(mixed, classes_of, strict=True))
        train = [pair for pair, top in zip(named, tops, strict=True) if top in TRAIN]
        test = [pair for pair, top in zip(named, tops, strict=True) if top == held_out]
        if others := len(named) - len(train) - len(test):
            passed_over[f"images beside train and {held_out}"] = others
        if unknown := {name for _, name in test} - {name for _, name in train}:
            raise UserError(f"{path}: {held_out} has the class {min(unknown)}, of which train has no image")
    else:
        num_test = max(1, round(test_fraction * len(files)))
        if num_test >= len(files):
            raise UserError(f"{path} holds {len(files)} images: too few to set {num_test} aside for testing")
        named = list(zip(mixed, inner, strict=True))
        test, train = _with_every_class(named[:num_test], named[num_test:])
    classes = sorted({name for _, name in train + test})
    label = {name: k for k, name in enumerate(classes)}
    train_files, test_files = ([(file, label[name]) for file, name in split] for split in (train, test))
    return Images(root, train_files, test_files, classes, passed_over)


Pairs = list[tuple[str, str]]  # of a file and its class


def _with_every_class(test: Pairs, train: Pairs) -> tuple[Pairs, Pairs]:
    """A test and a training split, in which the classes that only test would have are trained on instead."""
    known = {name for _, name in train}
    kept = [pair for pair in test if pair[1] in known]
    if not kept:  # a class for every image: there must be something to test
        return test, train
    return kept, [pair for pair in test if pair[1] not in known] + train


def _below_what_they_share(folders: list[str]) -> list[str]:
    """Folders as seen from the lowest that holds them all, or from above it if that is the only one."""
    shared = os.path.commonpath(folders) if len(set(folders)) > 1 else os.path.dirname(folders[0])
    return [name[len(shared) :].lstrip(os.sep) or "." for name in folders]
