"""Settings for tests, composed from the shipped conf/ as main.py composes them."""

import dataclasses
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from modeling.config import load_config

CONF = Path(__file__).parents[2] / "conf"
REQUIRED = {"path": "x", "betas": "[0.05,0.1,0.2,0.3,0.4,0.5,0.6]"}  # for the keys that conf/ leaves to the user


def composed(*overrides):
    """The DictConfig of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


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
