"""Reading image files in parallel, in their order and without holding more than a few of them.

Many are read by processes, which take a second to start, fewer by threads.
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
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modeling.data.pictures import Picture, Rule, Unreadable, read_picture
from modeling.data.splits import Arrays
from modeling.reliability.errors import UserError
from modeling.reliability.signals import poll
from modeling.reliability.terminal import progress

log = logging.getLogger(__name__)
MANY = 1000  # images, from which on there are processes
CHUNK = 16  # images that are handed over at once
NAMED = 5  # unreadable files that are named; the others are only counted


class Reader:
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
