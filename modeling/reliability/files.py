"""Atomic files and folders: a reader finds the old content or the new, never a part. Also locks between processes."""

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modeling.reliability.errors import UserError, out_of_memory, require
from modeling.reliability.signals import poll

log = logging.getLogger(__name__)
NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a disk answers that cannot do a thing
STALE = 3600.0  # seconds without a change after which a partial file must stem from a killed process


def state_root() -> Path:
    """The main repository's root, where state survives DVC: $DVC_ROOT in a DVC run, which may work in a copy."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).parents[2])


def places(typed: str) -> list[Path]:
    """Where a path may be that the user typed: as seen from the working folder, then from the repository's root.

    DVC is run from that root, and may work in a copy, so that under DVC only the root counts.
    """
    roots = [state_root()] if "DVC_STAGE" in os.environ else [Path.cwd(), state_root()]
    return list(dict.fromkeys((root / Path(typed).expanduser()).resolve() for root in roots))


def existing(key: str, typed: str) -> Path:
    """The absolute path that a key of the configuration names, else raises ConfigError with the paths tried."""
    tried = places(typed)
    require(any(path.exists() for path in tried), key, typed, f"there is no {' and no '.join(map(str, tried))}")
    return next(path for path in tried if path.exists())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, flushed and renamed at the end; UserError leaves the old content intact."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_partial(path.parent, f".{path.name}.*", STALE)
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent, NOT_HERE)  # else the rename itself may be lost with the power
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if out_of_memory(error):
            raise
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _flush(path: Path, allowed: Sequence[int] = ()) -> None:
    """Flushes a file or folder to the disk; errors of the `allowed` numbers are none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in allowed:
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, else raises UserError."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as write_atomic does, with null for NaN and infinity, which JSON does not know."""
    write_atomic(path, (json.dumps(_finite(content), indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing_folder(target: Path, owned: str = "*") -> Iterator[Path]:
    """An empty folder to fill, which replaces `target` at the end; UserError leaves the old content intact.

    For one process at a time. Files of `target` that do not match the glob `owned` are kept.
    """
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        if old.exists() and not target.exists():  # killed between the two renames
            old.rename(target)
        for remnant in (partial, old):
            shutil.rmtree(remnant, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            for other in {*target.iterdir()} - {*target.glob(owned)}:
                other.rename(partial / other.name)
            target.rename(old)
        partial.rename(target)
    except OSError as error:  # shutil.Error is one too
        raise cannot_write(target, error) from None
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error to raise after a failed write."""
    reason = getattr(error, "strerror", None) or error
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


def make_writable(folder: Path) -> None:
    """Makes a folder and tries to write to it, so that UserError comes before the work whose result it shall hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(folder, error) from None


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Locks a file, until the process dies at the latest; if another has the lock, waits or raises a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise cannot_write(path, error) from None
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise cannot_write(path, error) from None
                log.warning("%s is on a disk without locks: do not run the same twice at a time", path.parent)
                break
            if not wait:
                working = f"{path.read_text(errors='replace').strip() or 'another process'} is working in {path.parent}"
                raise UserError(f"{working}: wait for its end or stop it, then run this again")
            poll()
            time.sleep(0.1)
        with suppress(OSError):  # the lock holds on a full disk too; only its owner's name is lost
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def sharers(locks: Iterable[Path]) -> list[int]:
    """The other processes that hold any of these locks (see `locked`) on this machine and on cores of this process."""
    found = []
    for path in locks:
        with suppress(OSError, ValueError, IndexError), path.open("rb") as file:
            _, owner, _, host = file.read().decode().split()
            process = int(owner)
            if host == socket.gethostname() and process != os.getpid() and _cores(process) & _cores(os.getpid()):
                try:  # its owner may have ended, and another process have its number
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(process)
    return found


def _cores(process: int) -> set[int]:
    """The cores that a process may use; OSError if there is no such process."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(process)
    os.kill(process, 0)  # not on every system can it be asked
    return {0}
