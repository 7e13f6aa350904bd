"""Rolling checkpoints of the whole training state, and the fingerprint that says whose they are.

A checkpoint is written beside its target, flushed, read back and renamed; the two newest stay; a damaged one is skipped
with a warning. It holds plain types and tensors only, so nothing is unpickled. Published models are safetensors whose
metadata carry the configuration, so that a network can be rebuilt from the file alone.
"""

import ast
import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from modeling.errors import UserError
from modeling.files import replacing, write_atomic

log = logging.getLogger(__name__)
KEEP = 2
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
        torch.save(dict(state), partial)
        _read_verified(partial)
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU, or None. Damaged ones are skipped with a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            return _read_verified(path)
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            log.warning("checkpoint %s is damaged (%s): using the one before it", path, str(error).split("\n")[0])
    return None


def _read_verified(path: Path) -> dict[str, Any]:
    """Reads a checkpoint and verifies the CRC-32 of every record, which torch.load alone does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save_model(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Publishes weights as safetensors, with `config` as JSON in the metadata.

    Raises:
        UserError: the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors_bytes(contiguous, {"config": json.dumps(config, sort_keys=True)}))


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a published model.

    Raises:
        UserError: missing, damaged, or not written by save_model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        return tensors, json.loads(metadata["config"])
    except FileNotFoundError:
        raise UserError(f"no model in {path}: train one first (stage=train) or name a file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"model {path} is damaged: {error}") from None
    except KeyError:
        raise UserError(f"model {path} carries no configuration: it was not written by this project") from None
