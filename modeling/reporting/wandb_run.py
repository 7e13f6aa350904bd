"""The W&B run: the only module that imports wandb. Never uploads code, never prompts, never blocks for long.

Without a key or a network the run is written offline, and one line says how to open it and how to sync it. Every value
is logged with an explicit step, so that a resumed run continues its curves. If W&B fails, training goes on without it.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor

from modeling.reliability.errors import ConfigError, short
from modeling.settings import WandbConfig

log = logging.getLogger(__name__)
MODES = ("online", "offline", "disabled")


class WandbRun:
    """One W&B run, or none if the mode is `disabled`.

    Args:
        settings: the wandb group; the environment's WANDB_MODE wins over its mode, ConfigError if that is unknown.
        config: the run's hyperparameters.
        run_id: the same id continues the same run.
        name: in the dashboard.
        root: wandb/ is made there (W&B itself uses a temporary folder if it cannot).
    """

    def __init__(
        self, settings: WandbConfig, config: Mapping[str, Any], run_id: str, name: str | None, root: Path
    ) -> None:
        mode = os.environ.get("WANDB_MODE") or settings.mode
        if mode not in MODES:
            raise ConfigError(f"WANDB_MODE={mode}: allowed are {', '.join(MODES)}")
        self.run: Any = None
        self.folder: Path | None = None  # of this process's files, if the run is offline
        self.offline = False
        self.first = 0  # the first step that W&B's server does not have
        if mode == "disabled":
            return
        if mode == "online":
            try:
                reason = "" if wandb.login(prompt=False, verify=False, timeout=int(settings.timeout)) else "no API key"
            except Exception as error:  # such as a key of a wrong length
                reason = short(error)
            if reason:
                log.warning("W&B: %s (set WANDB_API_KEY or run `wandb login`): this run is offline", reason)
                mode = "offline"

        def start(mode: Any) -> Any:
            return wandb.init(
                project=settings.project,
                entity=settings.entity,
                config=dict(config),
                id=run_id,
                name=name,
                resume="allow",
                allow_val_change=True,  # evaluated again with another sampler
                dir=str(root),
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=settings.timeout,
                    finish_timeout=settings.timeout,
                    save_code=False,
                    disable_code=True,
                    disable_git=True,  # else W&B uploads the difference to the last commit
                    console="off",
                    silent=True,
                ),
            )

        try:
            self.run = start(mode)
        except Exception as error:  # not only W&B's own kinds
            if mode == "offline":
                self._failed(error)
                return
            log.warning("W&B: no connection (%s): this run is offline", short(error))
            try:
                wandb.teardown()
                self.run = start("offline")
            except Exception as again:  # of W&B's process or its files
                self._failed(again)
                return
        self.offline = bool(self.run.offline)
        if self.offline:
            self.folder = Path(self.run.settings.sync_dir)
        self.first = 0 if self.offline else int(self.run.step)

    def lacks(self, step: int) -> bool:
        """Whether W&B's server does not have this step yet."""
        return self.run is not None and step >= self.first

    def _guarded(self, what: Callable[[], object]) -> None:
        """Calls `what`; if that fails, tracking ends and training goes on."""
        if self.run is None:
            return
        try:
            what()
        except Exception as error:  # of W&B's process, its network, its files
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.warning("W&B failed (%s): no more of this run is tracked there", short(error))
        self.run = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values under a step."""
        self._guarded(lambda: self.run.log(dict(values), step=step))

    def image(self, key: str, image: Tensor, step: int) -> None:
        """Logs uint8 [H, W, C] as a picture."""

        def log_image() -> None:
            array = image.numpy()
            self.run.log({key: wandb.Image(array.squeeze(2) if array.shape[2] == 1 else array)}, step=step)

        self._guarded(log_image)

    def picture(self, key: str, path: Path, step: int) -> None:
        """Logs a picture file."""
        self._guarded(lambda: self.run.log({key: wandb.Image(str(path))}, step=step))

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Attaches a file to the run."""

        def attach() -> None:
            artifact = wandb.Artifact(f"{name}-{self.run.id}", type=kind)
            artifact.add_file(str(path))
            self.run.log_artifact(artifact)

        self._guarded(attach)

    def replaces(self, earlier: Iterable[str]) -> None:
        """Removes earlier offline folders of this run, whose content this one repeats."""
        for name in earlier:
            if self.run is not None and Path(name).name.endswith(f"-{self.run.id}") and Path(name) != self.folder:
                shutil.rmtree(name, ignore_errors=True)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run, and logs how to open it."""
        if self.run is None:
            return
        url = None if self.offline else self.run.url
        self._guarded(lambda: self.run.finish(exit_code=exit_code))
        if self.offline:
            log.info("W&B (offline): look with `wandb leet %s`, upload with `wandb sync %s`", self.folder, self.folder)
        else:
            log.info("W&B: %s", url)
