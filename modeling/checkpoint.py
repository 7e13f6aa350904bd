"""Rolling checkpoints of the whole training state, and the fingerprint that says whose they are.

A checkpoint is written beside its target, flushed, read back and renamed; the two newest stay; a damaged one is skipped
with a warning, but where all are damaged nobody starts from zero unasked. It holds plain types and tensors only, so
nothing is unpickled. Published models are safetensors whose metadata carry the configuration, so that a network can be
rebuilt from the file alone.
"""

import ast
import hashlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from modeling.errors import UserError
from modeling.faults import out_of_memory
from modeling.files import replacing, write_atomic

log = logging.getLogger(__name__)
KEEP = 2
NAME = re.compile(r"step-\d{9,}\.pt")
VERSION = 2  # of what a checkpoint holds; a file of another version is not read
PACKAGE = Path(__file__).parent


def imported_files(entry: str, package: Path = PACKAGE) -> list[Path]:
    """The package's files that module `entry` imports, itself included, directly or not; sorted by name."""
    found: set[Path] = set()
    queue = [entry]
    while queue:
        path = package / f"{queue.pop()}.py"
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package.name}."):
                queue.append(node.module.split(".")[1])
    return sorted(found)


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name a training run by all that determines its result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(entry: str) -> str:
    """SHA-256 over the files that module `entry` imports."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in imported_files(entry))).hexdigest()


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Saves the state after `step` steps and drops all but the newest two.

    Raises:
        UserError: the folder cannot be written; the earlier checkpoints are intact.
    """
    path = folder / f"step-{step:09}.pt"
    with replacing(path) as partial:
        with partial.open("wb") as file:  # given a path, torch does not say that the disk is full
            torch.save({"version": VERSION, **state}, file)
        read_checkpoint(partial)
    # Of this step and before: a damaged one of a later step, passed over by a resume, is none of the two.
    for old in [found for found in checkpoints(folder) if found.name <= path.name][:-KEEP]:
        try:
            old.unlink()
        except OSError as error:
            log.warning("the old checkpoint %s cannot be removed: %s", old, error)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; a user's own files beside them are none."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


class Damaged(RuntimeError):
    """A checkpoint that cannot be used; says why, in one line."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that a checkpoint holds, on the CPU, every record verified by its CRC-32 (torch.load alone does not).

    Raises:
        Damaged: unreadable, truncated, altered, of another version, or more than plain types and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores without compression, so what expands is not a checkpoint.
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = archive.testzip() if plain else "a compressed record"
        if damaged:
            raise Damaged(f"checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is strange about the file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a parser of hostile bytes raises is a long list, and none of it is our bug
        if out_of_memory(error):
            raise
        raise Damaged(" ".join(str(error).split())[:120] or type(error).__name__) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise Damaged(f"its version is {found}, not {VERSION}")
    return state


def restore_newest(folder: Path, restore: Callable[[dict[str, Any]], None]) -> bool:
    """Hands the newest checkpoint that can be used to `restore`; the others are skipped with a warning.

    Args:
        folder: of the checkpoints.
        restore: raises Damaged if it cannot use a state.

    Returns:
        Whether there was one; False if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            restore(read_checkpoint(path))
        except Damaged as error:
            log.warning("checkpoint %s is damaged (%s): trying the one before it", path, error)
        else:
            return True
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {folder} can be used: trainer.resume=never starts from step 0"
        )
    return False


def save_model(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Publishes weights as safetensors, with `config` as JSON and a checksum of the weights in the metadata.

    Raises:
        UserError: the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # All in one entry: the order of several would differ from process to process.
    held = json.dumps({**config, "sha256": weights_hash(contiguous)}, sort_keys=True)
    write_atomic(path, safetensors_bytes(contiguous, {"config": held}))


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values, whatever file they come in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a published model.

    Raises:
        UserError: missing, damaged, or not written by save_model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        config: dict[str, Any] = json.loads(metadata["config"])
        if config["sha256"] != weights_hash(tensors):
            raise ValueError("its weights are not those that were saved")
        return tensors, config
    except FileNotFoundError:
        raise UserError(f"no model in {path}: train one first (stage=train) or name a file") from None
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"model {path} is damaged: {error}") from None
    except KeyError:
        raise UserError(f"model {path} carries no configuration: it was not written by this project") from None
