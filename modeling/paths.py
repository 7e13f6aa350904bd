"""Where things lie. State that must outlive DVC's own folders lies at the main repository's root."""

import hashlib
import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling.files import write_atomic
from modeling.settings import Config, DataConfig, FolderConfig, ShapesConfig


def state_root() -> Path:
    """The main repository's root: $DVC_ROOT in a DVC run, which may work in a throw-away copy; else this repository."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).parents[1])


def raw_cifar10() -> Path:
    """Where CIFAR-10's own files are, or are downloaded to."""
    return Path(os.environ.get("CIFAR10_ROOT") or state_root() / "data" / "raw")


def prepared_data(config: Config, data: DataConfig) -> Path:
    """The prepared arrays: under `out_dir` if that is set, else in a cache keyed by what they are made from."""
    if config.out_dir is not None:
        return Path(config.out_dir) / "data" / data.name
    key: dict[str, Any] = asdict(data)
    if isinstance(data, FolderConfig):
        files = sorted(p for p in Path(data.path).rglob("*") if p.is_file())
        key["files"] = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    if isinstance(data, ShapesConfig):
        key["code"] = (Path(__file__).parent / "shapes.py").read_text()  # that draws them
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return state_root() / "runs" / "data" / f"{data.name}-{digest}"


def read_notes(folder: Path) -> dict[str, Any]:
    """What is noted about a run in its folder's run.json; always its `wandb_id`, made on first use."""
    try:
        notes = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        notes = {}
    if not isinstance(notes, dict) or not isinstance(notes.get("wandb_id"), str):
        notes = {"wandb_id": uuid.uuid4().hex[:12]}
        write_notes(folder, notes)
    return notes


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Replaces the notes of a run.

    Raises:
        UserError: they cannot be written.
    """
    write_atomic(folder / "run.json", (json.dumps(notes, indent=2) + "\n").encode())
