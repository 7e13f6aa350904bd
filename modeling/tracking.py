"""The W&B run: the only module that imports wandb. Never the code, never a prompt, never a long wait.

No key or no network: the run is written offline, and one line says how to look at it and how to sync it. Every value is
logged with an explicit step, so that a resumed run continues its curves.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor

from modeling.errors import ConfigError
from modeling.settings import WandbConfig

log = logging.getLogger(__name__)
MODES = ("online", "offline", "disabled")


class Tracker:
    """One W&B run, or none if the mode is `disabled`.

    Args:
        settings: the wandb group; the environment's WANDB_MODE wins over its mode.
        config: the resolved configuration: the run's hyperparameters.
        run_id: the same id continues the same run.
        name: what the dashboard calls it.
        root: wandb/ is made there (W&B itself takes a temporary folder if it cannot).

    Raises:
        ConfigError: WANDB_MODE has an unknown value.
    """

    def __init__(
        self, settings: WandbConfig, config: Mapping[str, Any], run_id: str, name: str | None, root: Path
    ) -> None:
        mode = os.environ.get("WANDB_MODE") or settings.mode
        if mode not in MODES:
            raise ConfigError(f"WANDB_MODE={mode}: allowed are {', '.join(MODES)}")
        self.run: Any = None
        if mode == "disabled":
            return
        if mode == "online" and not wandb.login(prompt=False, verify=False, timeout=int(settings.timeout)):
            log.warning("W&B: no API key (set WANDB_API_KEY or run `wandb login`): this run is offline")
            mode = "offline"

        def start(mode: Any) -> Any:
            return wandb.init(
                project=settings.project,
                entity=settings.entity,
                config=dict(config),
                id=run_id,
                name=name,
                resume="allow",
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
        except wandb.errors.Error as error:
            log.warning("W&B: no connection (%s): this run is offline", str(error).split("\n")[0])
            wandb.teardown()
            self.run = start("offline")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values under a step."""
        if self.run is not None:
            self.run.log(dict(values), step=step)

    def image(self, key: str, image: Tensor, step: int) -> None:
        """Logs uint8 [H, W, C] as a picture."""
        if self.run is not None:
            array = image.numpy()
            self.run.log({key: wandb.Image(array.squeeze(2) if array.shape[2] == 1 else array)}, step=step)

    def artifact(self, name: str, kind: str, path: Path) -> None:
        """Attaches a file to the run."""
        if self.run is not None:
            artifact = wandb.Artifact(f"{name}-{self.run.id}", type=kind)
            artifact.add_file(str(path))
            self.run.log_artifact(artifact)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run, and says how to look at it."""
        if self.run is None:
            return
        folder, offline = Path(self.run.settings.sync_dir), self.run.offline
        url = None if offline else self.run.url
        self.run.finish(exit_code=exit_code)
        if offline:
            log.info("W&B (offline): look with `wandb leet %s`, upload with `wandb sync %s`", folder, folder)
        else:
            log.info("W&B: %s", url)
