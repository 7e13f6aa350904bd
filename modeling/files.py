"""Writing files so that a reader finds the old content or the new, and never a part; and locks between processes."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from modeling.errors import UserError
from modeling.faults import out_of_memory
from modeling.signals import poll

STALE = 3600.0  # seconds without a change after which a partial file is known to be left from a killed process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; flushed to disk and renamed at the end, or removed if anything failed.

    Raises:
        UserError: it cannot be written; what was there is intact.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_partial(path.parent, f".{path.name}.*", STALE)
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # else the rename itself may be lost with the power
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if out_of_memory(error):
            raise
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def cannot_write(path: Path, error: Exception) -> UserError:
    """What to tell of a failed write."""
    reason: object = error.strerror if isinstance(error, OSError) and error.strerror else error
    with suppress(OSError):  # NumPy and torch do not say that it is the disk
        if shutil.disk_usage(path.parent).free < 1 << 16:
            reason = "no space left on the device"
    return UserError(f"{path} cannot be written: {reason}")


def drop_partial(folder: Path, pattern: str, older_than: float = 0.0) -> None:
    """Removes files that a killed process left half-written, unless they changed in the last `older_than` seconds."""
    for partial in folder.glob(pattern):
        with suppress(OSError):  # its writer may have finished in this moment
            if time.time() - partial.stat().st_mtime >= older_than:
                partial.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        raise cannot_write(folder, error) from None


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds the lock file `path`; the system releases it when the process ends, however it ends.

    Args:
        path: made if it is not there, and left there.
        wait: for whoever holds it, instead of refusing.

    Raises:
        UserError: another process holds it (the message names it), or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise cannot_write(path, error) from None
    with file:
        while not _try_lock(file):
            if not wait:
                file.seek(0)
                owner = file.read().decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{owner} is working in {path.parent}: wait for its end or stop it, then run this again"
                )
            poll()
            time.sleep(0.1)
        with suppress(OSError):  # the lock holds on a full disk too; only its owner's name is lost
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
