"""From a folder to images with classes and a split: which files count, what they are, and reading them in parallel.

Sub-folders are classes. `train` beside `test` or `val` is the split; else a part of the images is drawn for testing.
"""

import logging
import os
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modeling.data.pictures import Picture, Rule, Unreadable, read_picture, suffixes
from modeling.data.splits import Arrays, Source
from modeling.reliability.errors import UserError, require
from modeling.reliability.files import existing
from modeling.reliability.signals import poll
from modeling.reliability.terminal import counts, progress

log = logging.getLogger(__name__)
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first of them that is there
MANY = 1000  # images are read by processes, which take a second to start; fewer by threads
CHUNK = 16  # images that are handed over at once
NAMED = 5  # unreadable files that are named; the others are only counted


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
    reader = _Reader(images.root, Rule(**rule), skip_unreadable)
    return partial(reader.parts, images.train), partial(reader.parts, images.test), images.classes


def folder_form(path: str, test_fraction: float, skip_unreadable: bool, **rule: Any) -> tuple[list[int], list[str]]:
    """The shape (H, W, C) of the images, as the first of them shows it, and the classes."""
    images = find_images(path, test_fraction)
    reader = _Reader(images.root, Rule(**rule), skip_unreadable)
    pixels, _ = next(reader.parts(images.train, 1, Counter()), (None, None))
    if pixels is None:
        raise UserError(f"no image of {path} can be read")
    return list(pixels.shape[1:]), images.classes


class _Reader:
    """Reads images of one folder; those of all splits must have one size."""

    def __init__(self, root: Path, rule: Rule, skip_unreadable: bool) -> None:
        self.root, self.rule, self.skip_unreadable = root, rule, skip_unreadable
        self.first: tuple[str, tuple[int, ...]] | None = None  # the first image with its shape

    def parts(self, files: Sequence[tuple[str, int]], threads: int, notes: Counter[str]) -> Iterator[Arrays]:
        """Each image with its label, in their order whatever the number of processes; see splits.py."""
        chunks = [files[k : k + CHUNK] for k in range(0, len(files), CHUNK)]
        if threads > 1 and len(files) >= MANY:
            pool: Executor = ProcessPoolExecutor(threads, get_context("spawn"), _begin)
        else:
            pool = ThreadPoolExecutor(threads)
        try:
            with progress("preparing", len(files)) as shown, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about the files
                reading = (pool.submit(_read, [self.root / name for name, _ in chunk], self.rule) for chunk in chunks)
                ahead = deque(islice(reading, 2 * threads))  # no more, so that the memory does not grow with the folder
                for chunk in chunks:
                    poll()
                    pictures = ahead.popleft().result()
                    ahead.extend(islice(reading, 1))
                    found = [self._pixels(*pair, notes) for pair in zip(pictures, chunk, strict=True)]
                    shown.advance(len(chunk))
                    labels = [k for pixels, (_, k) in zip(found, chunk, strict=True) if pixels is not None]
                    if labels:
                        yield np.stack([pixels for pixels in found if pixels is not None]), np.array(labels)
        except BrokenProcessPool:
            poll()  # whoever stopped that process may have stopped this one too
            raise UserError(
                f"a process that read images of {self.root} was killed; threads=1 does without any"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _pixels(
        self, picture: Picture | Unreadable, file: tuple[str, int], notes: Counter[str]
    ) -> npt.NDArray[np.uint8] | None:
        """Those of a picture that fits the others; None if it is left out."""
        if isinstance(picture, Unreadable):
            if not self.skip_unreadable:
                raise Unreadable(f"{picture}; data.skip_unreadable=true leaves such files out")
            notes["unreadable and left out"] += 1
            if notes["unreadable and left out"] <= NAMED:
                log.warning("left out: %s", picture)
            return None
        notes.update(picture.notes)
        self._check_size(file[0], picture.pixels.shape)
        return picture.pixels

    def _check_size(self, name: str, shape: tuple[int, ...]) -> None:
        first, size = self.first = self.first or (name, shape)
        if shape == size:
            return
        fits = 1 << max(3, min(6, min(*shape[:2], *size[:2]).bit_length() - 1))  # 8 to 64, which most models can take
        sizes = f"{self.root / name} is {shape[1]} x {shape[0]} pixels, {self.root / first} is {size[1]} x {size[0]}"
        advice = f"data.image_size={fits} resizes the short sides and cuts out the centres"
        raise UserError(f"{sizes}: all images must have one size; {advice}")


def _read(paths: Sequence[Path], rule: Rule) -> list[Picture | Unreadable]:
    found: list[Picture | Unreadable] = []
    for path in paths:
        try:
            found.append(read_picture(path, rule))
        except Unreadable as error:
            found.append(error)
    return found


def _begin() -> None:
    """In a process that reads: Ctrl-C is its parent's to heed, and it ends with its parent, even with a killed one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
    os._exit(1)


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
        test, train = named[:num_test], named[num_test:]
    classes = sorted({name for _, name in train + test})
    label = {name: k for k, name in enumerate(classes)}
    train_files, test_files = ([(file, label[name]) for file, name in split] for split in (train, test))
    return Images(root, train_files, test_files, classes, passed_over)


def _below_what_they_share(folders: list[str]) -> list[str]:
    """Folders as seen from the lowest that holds them all, or from above it if that is the only one."""
    shared = os.path.commonpath(folders) if len(set(folders)) > 1 else os.path.dirname(folders[0])
    return [name[len(shared) :].lstrip(os.sep) or "." for name in folders]
