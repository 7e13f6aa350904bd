"""The W&B run: the only module that imports wandb. Never uploads code, never prompts, never blocks for long.

Without a key or a network the run is written offline, and one line says how to open it and how to sync it. Every value
is logged with an explicit step, so that a resumed run continues its curves. If W&B fails, training goes on without it.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import wandb

from modeling.reliability.errors import ConfigError, short
from modeling.settings import WandbConfig

log = logging.getLogger(__name__)
MODES = ("online", "offline", "disabled")
MARK = "repeated-by-a-later-folder"  # a file in the offline folders of processes that log in `logging_again`


def chosen_mode(settings: WandbConfig) -> str:
    """The mode of the environment or else of the settings; ConfigError if it is unknown."""
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE={mode}: allowed are {', '.join(MODES)}")
    return mode


def has_key() -> bool:
    """Whether W&B finds an API key, in the environment or where `wandb login` leaves it; asks no server."""
    return bool(wandb.login(prompt=False, verify=False))


class WandbRun:
    """One W&B run, or none if the mode is `disabled` or W&B fails; the same `run_id` continues the same run.

    WANDB_MODE in the environment overrides the mode of the settings; ConfigError if it is unknown. Its files lie in
    wandb/ under `root`, or in a temporary folder if that cannot be written.
    """

    def __init__(
        self, settings: WandbConfig, config: Mapping[str, Any], run_id: str, name: str | None, root: Path
    ) -> None:
        mode = chosen_mode(settings)
        self.run: Any = None
        self.folder: Path | None = None  # of this process's files, if the run is offline
        self.first = 0  # the first step that W&B's server does not have
        options = wandb.Settings(
            init_timeout=settings.timeout,
            finish_timeout=settings.timeout,
            save_code=False,
            disable_code=True,
            disable_git=True,  # else W&B uploads the difference to the last commit
            console="off",
            silent=True,
        )
        about: dict[str, Any] = {"project": settings.project, "entity": settings.entity, "id": run_id, "name": name}
        about |= {"config": dict(config), "allow_val_change": True}  # a model is evaluated again with another sampler
        start = partial(wandb.init, **about, resume="allow", dir=str(root), settings=options)
        if mode == "online":
            try:
                wandb.setup(options)  # else the login asks the server for the name of the user
                if not wandb.login(prompt=False, verify=False):
                    raise RuntimeError("no API key: set WANDB_API_KEY or run `wandb login`")
                self.run = start(mode="online")
            except Exception as error:  # not only W&B's own kinds
                log.warning("W&B: no connection (%s): this run is offline", short(error))
                mode = "offline"
                with suppress(Exception):
                    wandb.teardown()
        with self._guarded():
            if mode == "offline":
                self.run = start(mode="offline")
            if self.run is not None and self.run.offline:
                self.folder = Path(self.run.settings.sync_dir)
            elif self.run is not None:
                self.first = int(self.run.step)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Catches every error of W&B's process, its network or its files: from then on, nothing is logged to W&B."""
        try:
            yield
        except Exception as error:  # each part of W&B has its own kinds, and none may end a training
            log.warning("W&B failed (%s): no more of this run is tracked there", short(error))
            self.run = None

    def log(self, values: Mapping[str, float | Path], step: int) -> None:
        """Logs numbers and pictures (PNG files) of a step, unless W&B's server has that step already."""
        if self.run is not None and step >= self.first:
            with self._guarded():
                items = {k: wandb.Image(str(v)) if isinstance(v, Path) else v for k, v in values.items()}
                self.run.log(items, step=step)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Attaches a file to the run."""
        if self.run is not None:
            with self._guarded():
                self.run.log_artifact(str(path), name=f"{name}-{self.run.id}", type=kind)

    @contextmanager
    def logging_again(self) -> Iterator[None]:
        """Within the context, all that earlier processes logged is logged again; then their offline folders go."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / MARK).touch()
        yield
        if self.folder is not None and self.run is not None:
            for mark in self.folder.parent.glob(f"*-{self.run.id}/{MARK}"):
                if mark.parent != self.folder:
                    shutil.rmtree(mark.parent, ignore_errors=True)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run, and logs how to open it."""
        if self.run is None:
            return
        url = self.run.url
        with self._guarded():
            self.run.finish(exit_code=exit_code)
        if self.folder is not None:
            log.info("W&B (offline): look with `wandb leet %s`, upload with `wandb sync %s`", self.folder, self.folder)
        else:
            log.info("W&B: %s", url)
