"""Runs the stage that the configuration names: python main.py stage=train model=small trainer.steps=1000."""

import argparse
import importlib
import logging
import os
import re
import shlex
import sys
import traceback
from pathlib import Path
from types import ModuleType

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modeling.distributed import launcher
from modeling.reliability.errors import ConfigError, Stopped, UserError, explain
from modeling.reliability.signals import poll, resume_command, stop_requests
from modeling.reliability.terminal import keep_streams, shorten_log

ORDER = ("validate", "prepare", "train", "sample", "evaluate", "report")
TYPED = tuple(sys.argv)
FAILED: list[int] = []  # exit codes of the jobs of --multirun that did not end well


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run(cfg: DictConfig) -> None:
    """Checks the configuration and runs its stage, or all of them in order."""
    from modeling.config import load_config  # here, since it takes longer than all else that --help needs of ours

    settings = HydraConfig.get()
    shorten_log()
    named = [*settings.overrides.task]
    if settings.job.config_name != "config":
        named.append("sampler")  # params.yaml says how to sample; else the model's recipe does, see as_recipe
    stage, resume = "", "auto"
    try:
        if cfg.get("stage") == "validate" and settings.job.config_name == "params":
            importlib.import_module("modeling.recipe").check_params(OmegaConf.to_container(cfg))
        config = load_config(cfg, named)
        resume = config.trainer.resume
        out = Path(config.out_dir or settings.runtime.output_dir)
        count = launcher.workers_to_start(config, settings.mode == RunMode.MULTIRUN)
        stages = ORDER if config.stage == "all" else (config.stage,)
        if count:
            launcher.share_cores(count)
            for stage in stages:
                _module(stage)  # once for all workers
            poll()
            code = launcher.launch(count, TYPED, resume)
            if code is not None:
                raise SystemExit(code)
        with launcher.joined(config, out) as out:
            for stage in stages:
                launcher.poll_all()  # what the first process has written in the stage before is there
                if launcher.takes_part(stage):
                    _module(stage).run(config, out)
    except Exception as error:  # here, since Hydra adds a line to what leaves this function
        code = _tell(error, stage, resume)
        if settings.mode != RunMode.MULTIRUN or isinstance(error, Stopped):
            raise SystemExit(code) from None
        FAILED.append(code)  # the jobs after this one run all the same


def _module(stage: str) -> ModuleType:
    return importlib.import_module(f"modeling.stages.{stage}")


def main() -> None:
    """Runs the command line; what a user can put right is one line, without a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself, in several lines, and always exits with 1
    os.environ["MPLBACKEND"] = "agg"  # a notebook's shell names one that only its kernel has
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what MPS lacks runs on the CPU: log_ndtr of bits/dim
    if sys.version_info >= (3, 14):  # it checks help texts that Hydra 1.3 makes when it prints them (hydra issue 3121)
        argparse.ArgumentParser._check_help = lambda parser, action: None
    logging.raiseExceptions = False  # a log file on a full disk must not hide what went wrong
    keep_streams()
    try:
        sys.argv += launcher.overrides()
        with stop_requests():
            run()
        if FAILED:
            launcher.print_last(f"error: {len(FAILED)} of the jobs of --multirun failed, see above", FAILED[0])
            raise SystemExit(FAILED[0])
    except Exception as error:  # what Hydra raises before `run`
        raise SystemExit(_tell(error)) from None
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # its reader has gone, as `head` does: else Python's own flush would end with code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(error: Exception, stage: str = "", resume: str = "auto") -> int:
    """Prints one line, or the traceback of a bug; gives the exit code."""
    code = error.exit_code if isinstance(error, UserError) else 1
    if isinstance(error, Stopped):
        begun = error.trained or stage in ("sample", "evaluate")
        line: str | None = f"{error}; to go on: {resume_command(TYPED, resume if begun else 'auto')}"
    elif isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError):
        from modeling.config import no_such_key

        unknown = re.match("Could not override '(.+?)'", str(error))
        line = f"error: {no_such_key(unknown[1]) if unknown else _how_to_quote(error) or error}"
        code = ConfigError.exit_code
    else:
        known = str(error) if isinstance(error, UserError) else explain(error, stage)
        line = known and f"error: {known}"
    launcher.print_last(" ".join(line.split()) if line else "".join(traceback.format_exception(error)).rstrip(), code)
    return code


def _how_to_quote(error: Exception) -> str | None:
    """What to type in place of an override that Hydra's grammar refuses, or None for any other error."""
    several = re.match("Ambiguous value for argument '(.+)'", str(error))
    override = error.override if isinstance(error, OverrideParseException) else several and several[1]
    if not override:
        return None
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: not of the form key=value; quote a value with blanks twice: 'data.path=\"/my images\"'"
    if value.startswith("~/"):
        return f"{override}: write $HOME for ~: {key}=$HOME{value[1:]}"
    quoted = '"' + value.replace('"', '\\"') + '"'
    sweep = "; several values need --multirun" if several else ""
    return f"{override}: quote the value twice: {shlex.quote(key + equals + quoted)}{sweep}"


if __name__ == "__main__":
    main()
