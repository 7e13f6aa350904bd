"""Runs the stage that the configuration names: python main.py stage=train model=small trainer.steps=1000."""

import importlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from modeling.config import load_config
from modeling.errors import ConfigError, Stopped, UserError

ORDER = ("prepare", "train", "sample", "evaluate")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(cfg: DictConfig) -> None:
    """Checks the configuration and runs its stage, or all of them in order."""
    settings = HydraConfig.get()
    try:
        config = load_config(cfg, settings.overrides.task)
        out = Path(config.out_dir or settings.runtime.output_dir)
        for stage in ORDER if config.stage == "all" else (config.stage,):
            importlib.import_module(f"modeling.stages.{stage}").run(config, out)
    except Stopped as stopped:
        _end(str(stopped), stopped.exit_code)
    except UserError as error:
        _end(f"error: {error}", error.exit_code)  # here, since Hydra adds a line to what leaves this function


def main() -> None:
    """Runs the command line; what a user can put right is one line, without a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, in several lines, and always exits with 1
    try:
        run()
    except (HydraException, OmegaConfBaseException) as error:
        _end(f"error: {error}", ConfigError.exit_code)


def _end(message: str, exit_code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
