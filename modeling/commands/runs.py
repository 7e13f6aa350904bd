"""Lists what lies in runs/ and removes what is no longer needed: python -m modeling.commands.runs --help."""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from modeling.checkpoints.checkpoint import checkpoints, step_of
from modeling.checkpoints.run_folder import read_notes
from modeling.commands import call
from modeling.reliability.errors import UserError
from modeling.reliability.files import locked, state_root
from modeling.reliability.terminal import duration

FINISHED = "finished"


@dataclass
class Entry:
    """A folder under runs/: the state of a training, or what is kept to save time."""

    folder: Path
    what: str  # the recipe, or what is kept
    state: str  # "running", "finished", "at step 40 of 100"; empty for what is kept
    experiment: str

    @property
    def name(self) -> str:
        return str(self.folder.relative_to(state_root() / "runs"))


def entries() -> list[Entry]:
    """All folders, the newest first."""
    root = state_root() / "runs"
    trainings = [_training(path.parent) for path in root.glob("*/config.yaml")]
    kept = [Entry(folder, kind, "", "") for kind, folder in _kept(root)]
    return sorted(trainings + kept, key=lambda entry: entry.folder.stat().st_mtime, reverse=True)


def _kept(root: Path) -> Iterator[tuple[str, Path]]:
    yield from (("prepared data", path) for path in root.glob("data/*") if path.is_dir())
    yield from (("samples of a model", path) for path in root.glob("samples*/*") if path.is_dir())
    yield from (("features for FID", path) for path in root.glob("reference") if path.is_dir())


def _training(folder: Path) -> Entry:
    config = OmegaConf.load(folder / "config.yaml")
    assert isinstance(config, DictConfig)  # as stages/train.py writes it
    notes = read_notes(folder)
    step = max(map(step_of, checkpoints(folder)), default=0)
    state = f"at step {step:,} of {config.trainer.steps:,}"
    if step >= config.trainer.steps and "weights_sha256" in notes and notes.get("finished", True):
        state = FINISHED
    try:
        with locked(folder / "lock", wait=False):
            pass
    except UserError:
        state = "running"
    t, o = config.trainer, config.optimizer
    what = f"{config.data.name} {config.model.name}, {o.name} {o.lr:g}, {t.steps:,} steps of {t.batch_size}"
    experiment = str(notes.get("experiment") or "")
    return Entry(folder, what, state, "" if experiment.startswith("by hand") else experiment)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # a running training replaces files
            total += path.stat().st_size if path.is_file() else 0
    return total


def show(found: Sequence[Entry]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("in runs/", "what", "state", "size", "age", "experiment"):
        table.add_column(heading, justify="right" if heading in ("size", "age") else "left", overflow="fold")
    for entry in found:
        megabytes, age = f"{size(entry.folder) / 1e6:,.1f} MB", duration(time.time() - entry.folder.stat().st_mtime)
        cells = (entry.name, entry.what, entry.state, megabytes, age, entry.experiment)
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 130, highlight=False).print(table)


def remove(found: Sequence[Entry], names: Sequence[str]) -> None:
    """Removes folders by their names, or all that are finished; UserError, before any is removed, for another name."""
    by_name = {entry.name: entry for entry in found}
    if unknown := [name for name in names if name != FINISHED and name not in by_name]:
        raise UserError(f"nothing is called {unknown[0]} in {state_root() / 'runs'}")
    chosen = [entry for entry in found if entry.name in names or (FINISHED in names and entry.state == FINISHED)]
    if running := [entry for entry in chosen if entry.state == "running"]:
        raise UserError(f"{running[0].name} is running: wait for its end or stop it, then run this again")
    for entry in chosen:
        freed = size(entry.folder)
        shutil.rmtree(entry.folder)
        print(f"removed {entry.name}: {entry.what} ({freed / 1e6:,.1f} MB)")
    if not chosen:
        print("nothing to remove")


def run(arguments: Sequence[str]) -> None:
    """Lists or removes, else raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling.commands.runs",
        description="The state of trainings in runs/, and what is kept there to save time.",
        epilog="A removed training cannot be resumed or made longer; models/ and reports/ stay as they are.",
    )
    about = "remove these, by the names in the first column; 'finished': each training that has published its model"
    parser.add_argument("--remove", nargs="+", metavar="NAME", help=about)
    options = parser.parse_args(arguments)
    found = entries()
    if options.remove:
        remove(found, options.remove)
    elif found:
        show(found)
    else:
        print(f"nothing in {state_root() / 'runs'} yet")


def main() -> None:
    call(run)


if __name__ == "__main__":
    main()
