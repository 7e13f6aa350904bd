"""The folder of a training run, runs/<fingerprint>/ at the repository's root, and the checkpoint that it starts from.

It holds the rolling checkpoints, train.csv, samples/, config.yaml and run.json, and survives whatever DVC does to its
outputs. A lock in it keeps two processes from the same run.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from modeling.checkpoints.checkpoint import checkpoints, step_of
from modeling.checkpoints.fingerprint import code_hash, fingerprint
from modeling.reliability.errors import ConfigError
from modeling.reliability.files import cannot_write, drop_partial, locked, places, state_root, write_json
from modeling.settings.groups import Config
from modeling.settings.keys import affects

log = logging.getLogger(__name__)


def read_notes(folder: Path) -> dict[str, Any]:
    """The content of a run's run.json; always with its `wandb_id`, made on first use."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "run.json").read_text())
        if isinstance(found, dict) and isinstance(found.get("wandb_id"), str):
            return found
    notes = {"wandb_id": uuid.uuid4().hex[:12]}
    write_notes(folder, notes)
    return notes


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Replaces a run's run.json, else raises UserError."""
    write_json(folder / "run.json", notes)


def run_of_weights(weights_sha256: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder and the notes of the newest run that published these weights, if there is one."""
    return next((found for found in _runs() if found[1].get("weights_sha256") == weights_sha256), None)


class Start(NamedTuple):
    path: Path  # of a checkpoint that a run starts from
    sha256: str


def start_checkpoint(config: Config) -> Start | None:
    """The checkpoint that trainer.resume names, if any; a run that began from it remembers it once it is removed."""
    if (resume := config.trainer.resume) in ("auto", "never"):
        return None
    paths = places(resume)
    for path in filter(Path.is_file, paths):
        return Start(path, hashlib.sha256(path.read_bytes()).hexdigest())
    for folder, notes in _runs():
        if notes.get("start", {}).get("path") in map(str, paths) and checkpoints(folder):
            return Start(Path(notes["start"]["path"]), notes["start"]["sha256"])
    tried = " and no ".join(map(str, paths))
    raise ConfigError(f"trainer.resume={resume}: there is no {tried}; allowed are auto, never, or a checkpoint's path")


def _runs() -> list[tuple[Path, dict[str, Any]]]:
    """The folders of all runs and their notes, the newest first."""
    notes = (state_root() / "runs").glob("*/run.json")
    return [(p.parent, read_notes(p.parent)) for p in sorted(notes, key=lambda p: p.stat().st_mtime, reverse=True)]


def recipe_parts(config: Config, bf16: bool, data_sha256: dict[str, str], start: Start | None) -> dict[str, Any]:
    """All input that determines a run's weights: not its duration, its logging or its device."""
    names = ("model", "diffusion", "optimizer", "trainer")
    groups = {name: affects(getattr(config, name), "weights") for name in names}
    if config.diffusion.variance != "learned":  # the fixed ones matter to sampling only
        del groups["diffusion"]["variance"]
    return groups | {
        "seed": config.seed,
        "precision": "bf16" if bf16 else "fp32",  # what `auto` means here
        "deterministic": config.deterministic,
        "data": data_sha256,
        "steps": config.trainer.steps if config.ends_matter() else None,
        "start": start.sha256 if start else None,
    }


class Run:
    """A training run: its `name` (the fingerprint), its `folder`, its `notes`, and the checkpoint it starts from."""

    def __init__(self, config: Config, bf16: bool, data_sha256: dict[str, str]) -> None:
        self.start = start_checkpoint(config)
        self.resume = config.trainer.resume
        self.parts = recipe_parts(config, bf16, data_sha256, self.start)
        self.name = fingerprint(self.parts | {"code": code_hash("training.trainer", "build")})
        self.folder = state_root() / "runs" / self.name
        steps = config.trainer.steps
        if self.resume != "never" and any(step_of(path) > steps for path in checkpoints(self.folder)):
            self.folder = self.folder.with_name(f"{self.name}-upto-{steps}")  # ends before the state's step
        self.notes: dict[str, Any] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process, and reads and writes its notes; else raises UserError."""
        with locked(self.folder / "lock", wait=False):
            for folder in (self.folder, self.folder / "samples"):
                drop_partial(folder, ".*.*")
            fresh = not checkpoints(self.folder)
            if fresh and self.resume != "never":
                self._mention_similar_runs()
            elif not fresh and self.resume == "never":
                self._set_aside()
            self.notes = read_notes(self.folder) | {"recipe": fingerprint(self.parts)}
            if self.start:
                self.notes["start"] = {"path": str(self.start.path), "sha256": self.start.sha256}
            write_notes(self.folder, self.notes)
            yield

    def _set_aside(self) -> None:
        """Moves the state to replaced/, in place of the one that is there."""
        replaced = self.folder / "replaced"
        state = [*checkpoints(self.folder), *(self.folder / name for name in ("train.csv", "run.json", "samples"))]
        try:
            shutil.rmtree(replaced, ignore_errors=True)
            replaced.mkdir()
            for path in filter(Path.exists, state):
                path.rename(replaced / path.name)
        except OSError as error:
            raise cannot_write(replaced, error) from None
        log.info("trainer.resume=never: the earlier state is in %s until the next time", replaced)

    def _mention_similar_runs(self) -> None:
        """Logs the newest state of the same recipe with other code, and of the same recipe in the other precision."""
        other = "fp32" if self.parts["precision"] == "bf16" else "bf16"

        def newest(recipe: str) -> Path | None:
            folders = (folder for folder, notes in _runs() if notes.get("recipe") == recipe)
            others = (checkpoints(folder) for folder in folders if not folder.name.startswith(self.name))
            return next((found[-1] for found in others if found), None)

        if path := newest(fingerprint(self.parts)):
            reason = f"the code that training imports has changed since step {step_of(path)} of {path.parent}"
            log.info("%s: starting fresh; trainer.resume=%s goes on from there", reason, path)
        if path := newest(fingerprint(self.parts | {"precision": other})):
            reason = f"there is a state of step {step_of(path)} of this run in {other}"
            log.info("%s: starting fresh; precision=%s goes on from there", reason, other)
