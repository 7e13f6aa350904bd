"""Runs the stage that the configuration names: python main.py stage=train model=small trainer.steps=1000."""

import importlib
import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from modeling.config import load_config
from modeling.errors import UserError

log = logging.getLogger("main")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Checks the configuration and runs its stage, or all of them in order."""
    hydra_config = HydraConfig.get()
    try:
        config = load_config(cfg, hydra_config.overrides.task)
        out = Path(config.out_dir or hydra_config.runtime.output_dir)
        stages = ("prepare", "train", "sample", "evaluate") if config.stage == "all" else (config.stage,)
        for stage in stages:
            importlib.import_module(f"modeling.stages.{stage}").run(config, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
