"""Writing files so that a reader finds the old content or the new, and never a part."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; flushed to disk and renamed at the end, or removed if anything failed.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} cannot be written: {error}") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def make_writable(folder: Path) -> None:
    """Makes a folder and tries to write to it, before work is put into what it shall hold.

    Raises:
        UserError: it cannot be written.
    """
    probe = folder / f".write-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
