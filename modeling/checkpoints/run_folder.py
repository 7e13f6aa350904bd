"""The folder of a training run, runs/<fingerprint>/ at the repository's root: whose it is, and what it starts from.

It holds the rolling checkpoints, train.csv, samples/, config.yaml and run.json, and survives whatever DVC does to its
outputs. A lock in it keeps two processes from the same run.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from modeling.checkpoints.checkpoint import checkpoints, step_of
from modeling.checkpoints.fingerprint import code_hash, fingerprint
from modeling.reliability.errors import ConfigError
from modeling.reliability.files import cannot_write, drop_partial, locked, make_writable, state_root, write_atomic
from modeling.settings import Config, affects

log = logging.getLogger(__name__)


def read_notes(folder: Path) -> dict[str, Any]:
    """The content of a run's run.json; always with its `wandb_id`, made on first use."""
    try:
        notes = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        notes = {}
    if not isinstance(notes, dict) or not isinstance(notes.get("wandb_id"), str):
        notes = {"wandb_id": uuid.uuid4().hex[:12]}
        write_notes(folder, notes)
    return notes


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Replaces a run's run.json, else raises UserError."""
    write_atomic(folder / "run.json", (json.dumps(notes, indent=2) + "\n").encode())


class Start(NamedTuple):
    """A checkpoint that a run starts from."""

    path: Path
    sha256: str


def recipe_parts(config: Config, bf16: bool, data_sha256: dict[str, str], start: Start | None) -> dict[str, Any]:
    """All input that determines a run's weights: not its duration, its logging or its device."""
    groups = {
        name: affects(getattr(config, name), "weights") for name in ("model", "diffusion", "optimizer", "trainer")
    }
    if config.diffusion.variance != "learned":  # the fixed ones matter to sampling only
        del groups["diffusion"]["variance"]
    return groups | {
        "seed": config.seed,
        "precision": "bf16" if bf16 else "fp32",  # what `auto` means here
        "deterministic": config.deterministic,
        "data": data_sha256,
        "steps": config.trainer.steps if config.optimizer.lr_decay != "none" else None,
        "start": start.sha256 if start else None,
    }


def start_checkpoint(config: Config) -> Start | None:
    """The checkpoint that trainer.resume names, or None if it is `auto` or `never`.

    The file may be gone once a run has started from it and has checkpoints of its own: old checkpoints are removed.

    Raises:
        ConfigError: there is no such file, here or under the repository's root.
    """
    resume = config.trainer.resume
    if resume in ("auto", "never"):
        return None
    paths = [Path(resume).absolute(), state_root() / resume]
    for path in paths:
        if path.is_file():
            return Start(path, hashlib.sha256(path.read_bytes()).hexdigest())
    noted = sorted((state_root() / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in noted):
        start = read_notes(folder).get("start")
        if isinstance(start, dict) and str(start.get("path")) in map(str, paths) and checkpoints(folder):
            return Start(Path(start["path"]), str(start.get("sha256")))
    raise ConfigError(f"trainer.resume={resume}: no such file; allowed are auto, never, or a checkpoint to start from")


class Run:
    """A training run: its `name` (the fingerprint), its `folder`, its `notes`, and the checkpoint it starts from.

    Args:
        bf16: whether it trains in bf16.
        data_sha256: of the prepared arrays.

    Raises:
        ConfigError: trainer.resume names a file that does not exist.
    """

    def __init__(self, config: Config, bf16: bool, data_sha256: dict[str, str]) -> None:
        self.start = start_checkpoint(config)
        self.resume = config.trainer.resume
        parts = recipe_parts(config, bf16, data_sha256, self.start)
        self.recipe = fingerprint(parts)  # without the code
        self.other_precision = "fp32" if bf16 else "bf16"
        self.other_recipe = fingerprint(parts | {"precision": self.other_precision})
        self.name = fingerprint(parts | {"code": code_hash("training.trainer", "build")})
        self.folder = state_root() / "runs" / self.name
        steps = config.trainer.steps
        if self.resume != "never" and any(step_of(path) > steps for path in checkpoints(self.folder)):
            self.folder = self.folder.with_name(f"{self.name}-upto-{steps}")  # ends before the state's step
        self.notes: dict[str, Any] = {}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for this process alone, and reads and writes its notes; else raises UserError."""
        make_writable(self.folder / "samples")
        with locked(self.folder / "lock", wait=False):
            drop_partial(self.folder, ".*.*")
            drop_partial(self.folder / "samples", ".*.*")
            if self.resume == "never":
                self._set_aside()
            elif not checkpoints(self.folder):
                self._mention_similar_runs()
            self.notes = read_notes(self.folder) | {"recipe": self.recipe}
            if self.start:
                self.notes["start"] = {"path": str(self.start.path), "sha256": self.start.sha256}
            write_notes(self.folder, self.notes)
            yield

    def _set_aside(self) -> None:
        """Moves the state to replaced/, which holds one state. A state without a checkpoint is deleted."""
        replaced, kept = self.folder / "replaced", checkpoints(self.folder)
        found = [*kept, *(self.folder / name for name in ("train.csv", "run.json", "samples"))]
        try:
            if kept:
                shutil.rmtree(replaced, ignore_errors=True)
                replaced.mkdir()
            for path in filter(Path.exists, found):
                if kept:
                    path.rename(replaced / path.name)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            (self.folder / "samples").mkdir()
        except OSError as error:
            raise cannot_write(replaced, error) from None
        if kept:
            log.info("trainer.resume=never: the earlier state is in %s until the next time", replaced)

    def _mention_similar_runs(self) -> None:
        """Logs the newest state of the same recipe with other code, and of the same recipe in the other precision."""
        found: dict[str, list[Path]] = {self.recipe: [], self.other_recipe: []}
        for path in self.folder.parent.glob("*/run.json"):
            recipe = read_notes(path.parent).get("recipe")
            if recipe in found and path.parent.name.split("-")[0] != self.name:
                found[recipe] += checkpoints(path.parent)
        for recipe, paths in found.items():
            if not paths:
                continue
            newest = max(paths, key=lambda path: path.stat().st_mtime)
            if recipe == self.recipe:
                reason = f"the code that training imports has changed since step {step_of(newest)} of {newest.parent}"
                key = f"trainer.resume={newest}"
            else:
                reason = f"there is a state of step {step_of(newest)} of this run in {self.other_precision}"
                key = f"precision={self.other_precision}"
            log.info("%s: starting fresh; %s goes on from there", reason, key)
