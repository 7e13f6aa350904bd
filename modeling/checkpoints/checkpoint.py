"""Rolling checkpoints of the whole training state.

A checkpoint is written beside its target, read back, flushed and renamed; the two newest stay. A damaged one is skipped
with a warning, but if all are damaged, training does not silently start from step 0. It holds plain types and tensors
only, so nothing is unpickled.
"""

import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modeling.reliability.errors import UserError, out_of_memory, short
from modeling.reliability.files import replacing

log = logging.getLogger(__name__)
KEEP = 2
NAME = re.compile(r"step-\d{9,}\.pt")
VERSION = 3  # of what a checkpoint holds; a file of another version is not read


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Saves the state after `step` steps and removes all but the newest two; UserError leaves the others intact."""
    path = folder / f"step-{step:09}.pt"
    with replacing(path) as partial:
        with partial.open("wb") as file:  # given a path, torch does not say that the disk is full
            torch.save({"version": VERSION, **state}, file)
        read_checkpoint(partial)
    # Of this step and before: a damaged one of a later step, skipped by a resume, is none of the two.
    for old in [found for found in checkpoints(folder) if found <= path][:-KEEP]:
        try:
            old.unlink()
        except OSError as error:
            log.warning("the old checkpoint %s cannot be removed: %s", old, error)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a user's own files beside them do not count."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or a sample grid."""
    return int(path.stem.split("-")[1])


class Damaged(RuntimeError):
    """A checkpoint cannot be used; the message says why, in one line."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU, every record verified by its CRC-32 (torch.load alone does not)."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores without compression, so what expands is not a checkpoint.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
            if record := archive.testzip():
                raise ValueError(f"checksum of {record}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities of the file
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("version") != VERSION:
            raise ValueError(f"its version is {state.get('version')}, not {VERSION}")
    except Exception as error:  # what a parser of hostile bytes raises is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        raise Damaged(short(error)) from None
    return state


def restore_newest(folder: Path, restore: Callable[[dict[str, Any]], None]) -> bool:
    """Passes the newest checkpoint that `restore` does not refuse as Damaged to it; False if the folder has none."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            restore(read_checkpoint(path))
            return True
        except Damaged as error:
            log.warning("checkpoint %s is damaged (%s): trying the one before it", path, error)
    if found:
        reason = f"none of the {len(found)} checkpoints in {folder} can be used"
        raise UserError(f"{reason}: trainer.resume=never starts from step 0")
    return False
