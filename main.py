"""Runs the stage that the configuration names: python main.py stage=train model=small trainer.steps=1000."""

import importlib
import logging
import os
import re
import sys
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from modeling.config import load_config, no_such_key
from modeling.distributed import launcher as launch
from modeling.reliability.errors import ConfigError, Stopped, UserError, explain
from modeling.reliability.signals import resume_command, stop_requests

ORDER = ("prepare", "train", "sample", "evaluate")
TYPED = tuple(sys.argv)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(cfg: DictConfig) -> None:
    """Checks the configuration and runs its stage, or all of them in order."""
    settings = HydraConfig.get()
    stage, resume = "", "auto"
    try:
        config = load_config(cfg, settings.overrides.task)
        resume = config.trainer.resume
        out = Path(config.out_dir or settings.runtime.output_dir)
        count = launch.check_processes(config, settings.mode == RunMode.MULTIRUN)
        if launch.must_launch(config):
            raise SystemExit(launch.launch(count, settings.runtime.output_dir, TYPED, resume))
        with launch.joined(config, out) as out:
            for stage in ORDER if config.stage == "all" else (config.stage,):
                launch.poll_together()
                if launch.rank() == 0 or stage in launch.TOGETHER:
                    importlib.import_module(f"modeling.stages.{stage}").run(config, out)
                launch.wait_for_all()  # what the first process has written is there for the next stage
    except Exception as error:  # here, since Hydra adds a line to what leaves this function
        _end(error, stage, resume)


def main() -> None:
    """Runs the command line; what a user can put right is one line, without a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, in several lines, and always exits with 1
    logging.raiseExceptions = False  # a log file on a full disk must not hide what went wrong
    sys.argv += launch.overrides()
    try:
        with stop_requests():
            run()
    except Exception as error:  # what Hydra raises before `run`; _end raises again what is a bug
        _end(error)


def _end(error: Exception, stage: str = "", resume: str = "auto") -> None:
    """Ends the process with one line, or passes on what is a bug."""
    code = error.exit_code if isinstance(error, UserError) else 1
    if not launch.may_tell(error):
        raise SystemExit(code)
    if isinstance(error, Stopped):
        begun = error.trained or stage in ("sample", "evaluate")
        line: str | None = f"{error}; to go on: {resume_command(TYPED, resume if begun else 'auto')}"
    elif isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError):
        unknown = re.match("Could not override '(.+?)'", str(error))
        line = f"error: {no_such_key(unknown[1]) if unknown else error}"
        code = ConfigError.exit_code
    else:
        known = str(error) if isinstance(error, UserError) else explain(error, stage)
        line = known and f"error: {known}"
    if line is None:
        raise error
    print(" ".join(line.split()), file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
