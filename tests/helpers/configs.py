"""Settings for tests, composed from the shipped conf/ as main.py composes them."""

import copy
import dataclasses
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from modeling.config import load_config

CONF = Path(__file__).parents[2] / "conf"
REQUIRED = {"path": "x", "betas": "[0.05,0.1,0.2,0.3,0.4,0.5,0.6]"}  # for the keys that conf/ leaves to the user


@lru_cache(None)
def _choices(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def composed(*overrides):
    """The DictConfig of a command line.

    Its choices are composed once in a process, since that takes a tenth of a second; then single keys are set by what
    Hydra sets them with.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [each for each in parsed if not ((CONF / each.key_or_group).is_dir() or each.is_sweep_override())]
    config = copy.deepcopy(_choices(*(override.input_line for override in parsed if override not in keys)))
    ConfigLoaderImpl._apply_overrides_to_config(keys, config)
    return config


def load(*overrides):
    """The settings of a command line."""
    return load_config(composed(*overrides), overrides)


@lru_cache
def _choice(name, choice):
    node = composed(f"{name}={choice}")[name]
    given = [f"{name}.{key}={REQUIRED[key]}" for key in node if OmegaConf.is_missing(node, key)]
    return getattr(load(f"{name}={choice}", *given), name)


def group(name, choice, **changes):
    """One group as conf/<name>/<choice>.yaml has it, with some keys changed (unchecked)."""
    return dataclasses.replace(_choice(name, choice), **changes)
