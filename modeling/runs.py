"""The folder of a training run, runs/<fingerprint>/ at the repository's root: whose it is, and what it goes on from.

It holds the rolling checkpoints, train.csv, samples/, config.yaml and run.json, and survives whatever DVC does to its
outputs. A lock in it keeps two processes from the same run.
"""

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from modeling.checkpoint import checkpoints, code_hash, fingerprint
from modeling.errors import ConfigError
from modeling.files import cannot_write, drop_partial, locked, make_writable
from modeling.paths import read_notes, state_root, write_notes
from modeling.settings import Config

log = logging.getLogger(__name__)
REPORTS = ("log_every", "evaluate_every", "evaluate_images", "sample_every", "sample_images", "sample_steps")
TRAINS = ("batch_size", "ema_decay", "random_flip", "timestep_sampling", "label_dropout")  # of the trainer group


class Start(NamedTuple):
    """A checkpoint that a run starts from."""

    path: Path
    sha256: str


def recipe_parts(config: Config, bf16: bool, data_sha256: dict[str, str], start: Start | None) -> dict[str, Any]:
    """All of the input that determines a run's weights: not its duration, its logging or its device."""
    model, diffusion = dataclasses.asdict(config.model), dataclasses.asdict(config.diffusion)
    del model["name"], model["weights"]
    if diffusion["variance"] != "learned":  # the fixed ones matter to sampling only
        del diffusion["variance"]
    trainer = {key: getattr(config.trainer, key) for key in TRAINS}
    return {
        "seed": config.seed,
        "precision": "bf16" if bf16 else "fp32",  # what `auto` means here
        "deterministic": config.deterministic,
        "data": data_sha256,
        "model": model,
        "diffusion": diffusion,
        "optimizer": dataclasses.asdict(config.optimizer),
        "trainer": trainer,
        "steps": config.trainer.steps if config.optimizer.lr_decay != "none" else None,
        "start": start.sha256 if start else None,
    }


def start_checkpoint(config: Config) -> Start | None:
    """The checkpoint that trainer.resume names, or None if it is `auto` or `never`.

    It may be gone once a run has started from it and has checkpoints of its own: the oldest of a run go.

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
    """A training run: its `name` (the fingerprint), its `folder`, and the checkpoint it starts from, if it is told to.

    Args:
        config: the whole configuration.
        bf16: whether it trains in bf16.
        data_sha256: of the prepared arrays.

    Raises:
        ConfigError: trainer.resume names a file that is not there.
    """

    def __init__(self, config: Config, bf16: bool, data_sha256: dict[str, str]) -> None:
        self.config = config
        self.start = start_checkpoint(config)
        parts = recipe_parts(config, bf16, data_sha256, self.start)
        code = {"code": [code_hash("training"), code_hash("build")]}
        self.recipe = fingerprint(parts)
        self.name = fingerprint(parts | code)
        self.folder = state_root() / "runs" / self.name
        self.other_precision = "fp32" if bf16 else "bf16"
        self.in_other_precision = self.folder.with_name(fingerprint(parts | code | {"precision": self.other_precision}))
        steps = config.trainer.steps
        if config.trainer.resume != "never" and any(step_of(path) > steps for path in checkpoints(self.folder)):
            self.folder = self.folder.with_name(f"{self.name}-upto-{steps}")  # ends before the state's step

    @contextmanager
    def claimed(self) -> Iterator[dict[str, Any]]:
        """Holds the folder for this process alone and gives its notes (see paths.read_notes).

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        make_writable(self.folder / "samples")
        with locked(self.folder / "lock", wait=False):
            drop_partial(self.folder, ".*.*")
            drop_partial(self.folder / "samples", ".*.*")
            if self.config.trainer.resume == "never":
                self._set_aside()
            elif not checkpoints(self.folder):
                self._tell_of_other_code()
                self._tell_of_other_precision()
            notes = read_notes(self.folder) | {"recipe": self.recipe}
            if self.start:
                notes["start"] = {"path": str(self.start.path), "sha256": self.start.sha256}
            self._tell_of_other_reports(notes)
            write_notes(self.folder, notes)
            yield notes

    def _set_aside(self) -> None:
        """Moves what is there to replaced/, the only place for it: what was there before is deleted.

        What has no checkpoint is of no use, and does not replace what has.
        """
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

    def _tell_of_other_reports(self, notes: dict[str, Any]) -> None:
        """Says so if earlier rows and grids were made otherwise than those to come, and notes how these are made."""
        now = {key: getattr(self.config.trainer, key) for key in REPORTS}
        before = notes.get("reports")
        found = checkpoints(self.folder)
        if found and isinstance(before, dict) and before != now:
            changed = [f"trainer.{key}={before.get(key)}" for key in REPORTS if before.get(key) != now[key]]
            log.info(
                "up to step %d, rows and sample grids are those of %s; trainer.resume=never makes all of them again",
                step_of(found[-1]),
                ", ".join(changed),
            )
        notes["reports"] = now

    def _tell_of_other_precision(self) -> None:
        """Says so if the same was trained in the other precision, which `auto` means on another device."""
        found = checkpoints(self.in_other_precision)
        if found:
            log.info(
                "there is a state of step %d of this run in %s: starting fresh; precision=%s goes on from there",
                step_of(found[-1]),
                self.other_precision,
                self.other_precision,
            )

    def _tell_of_other_code(self) -> None:
        """Says so if the same configuration was trained with other code."""
        found: list[Path] = []
        for path in self.folder.parent.glob("*/run.json"):
            other = path.parent
            if other.name.split("-")[0] != self.name and read_notes(other).get("recipe") == self.recipe:
                found += checkpoints(other)
        if found:
            newest = max(found, key=lambda path: path.stat().st_mtime)
            log.info(
                "the code that training imports has changed since step %d of %s: starting fresh; "
                "trainer.resume=%s goes on from there",
                step_of(newest),
                newest.parent,
                newest,
            )


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or a sample grid."""
    return int(path.stem.split("-")[1])
